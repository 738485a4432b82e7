// Vectors of eight floats for the CPU library: loads and stores of float32, bfloat16 and float16, sixteen elements at a time.
#pragma once

#include "afd_core.h"
#ifdef __SSE2__
#include <immintrin.h>
#endif

// Not under AddressSanitizer: the resolvers of clones run before it starts.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

// F16C converts eight numbers at once. It is no clone: without it, the code for any type takes float16.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define AFD_F16C
#define F16_CODE __attribute__((target("avx2,f16c")))
static const bool f16_code = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
#else
#define F16_CODE
static const bool f16_code = true;
#endif

enum { W = 8 };  // 256-bit vectors: AVX2 holds them, AVX-512 gains nothing at memory speed
typedef float F __attribute__((vector_size(32)));
typedef uint32_t U __attribute__((vector_size(32)));
typedef int32_t I __attribute__((vector_size(32)));
typedef uint16_t H __attribute__((vector_size(16)));

INLINE int64_t size_of(int type) { return type == AFD_F32 ? 4 : 2; }
INLINE const char* at(const void* p, int type, int64_t i) { return (const char*)p + i * size_of(type); }

// To nearest even, in the high half. A NaN whose payload is all ones would overflow: only a float32 input can bring one.
template <bool CAREFUL>
INLINE U round_bf16(F f) {
  U u = (U)f, r = u + 0x7FFF + ((u >> 16) & 1);
  return (CAREFUL ? (U)(f != f ? (I)(u | 0x400000) : (I)r) : r) & 0xFFFF0000;
}

INLINE U pick(I mask, U a, U b) { return ((U)mask & a) | (~(U)mask & b); }

// float16 in the low half of each lane. A subnormal becomes the difference of two normal numbers, so that a thread which
// flushes subnormals reads it too.
INLINE F from_f16(U h) {
  U bits = (h & 0x7FFF) << 13, normal = bits + (112u << 23);
  F small = (F)(bits + (113u << 23)) - 0x1p-14f;
  U out = pick(bits < 1u << 23, (U)small, pick(bits >= 0x1Fu << 23, normal + (112u << 23), normal));
  return (F)(out | (h & 0x8000) << 16);
}

// To nearest even, in the low half: infinity from 65520 on, NaN stays NaN; below 2^-14 an addition does the rounding.
INLINE U to_f16(F f) {
  U u = (U)f, bits = u & 0x7FFFFFFF;
  U normal = (bits - (112u << 23) + 0xFFF + ((bits >> 13) & 1)) >> 13, small = (U)((F)bits + 0.5f) - 0x3F000000u;
  U large = pick(bits > 0x7F800000u, U{} + 0x7E00, U{} + 0x7C00);
  return pick(bits < 113u << 23, small, pick(bits >= 143u << 23, large, normal)) | (u >> 16 & 0x8000);
}

#ifdef AFD_F16C
INLINE F wide_f16(H h) { return __builtin_ia32_vcvtph2ps256((__v8hi)h); }
INLINE H narrow_f16(F f) { return (H)__builtin_ia32_vcvtps2ph256(f, 0); }  // to nearest even
#else
INLINE F wide_f16(H h) { return from_f16(__builtin_convertvector(h, U)); }
INLINE H narrow_f16(F f) { return __builtin_convertvector(to_f16(f), H); }
#endif

// To a type of 16 bits, as a float again.
template <bool SPLIT, bool CAREFUL>
INLINE F rounded(F f, int type) {
  if (type == AFD_BF16) return (F)round_bf16<CAREFUL>(f);
  return SPLIT ? from_f16(to_f16(f)) : wide_f16(narrow_f16(f));
}

// Sixteen elements. SPLIT: the even ones and the odd ones, what a load of bfloat16 gives for a shift and a mask; else the
// first eight and the last.
struct Pair { F x[2]; };

template <bool SPLIT>
INLINE Pair load(const void* p, int type, int64_t i) {
  if (!SPLIT && type == AFD_F16) {
    H a, b;
    memcpy(&a, (const uint16_t*)p + i, sizeof a);
    memcpy(&b, (const uint16_t*)p + i + W, sizeof b);
    return {wide_f16(a), wide_f16(b)};
  }
  if (SPLIT && type == AFD_BF16) {
    U u;
    memcpy(&u, (const uint16_t*)p + i, sizeof u);
    return {(F)(u << 16), (F)(u & 0xFFFF0000)};
  }
  if (SPLIT && type == AFD_F16) {
    U u;
    memcpy(&u, (const uint16_t*)p + i, sizeof u);
    return {from_f16(u & 0xFFFF), from_f16(u >> 16)};
  }
  F a, b;
  memcpy(&a, (const float*)p + i, sizeof a);
  memcpy(&b, (const float*)p + i + W, sizeof b);
  if (!SPLIT) return {a, b};
  return {__builtin_shuffle(a, b, I{0, 2, 4, 6, 8, 10, 12, 14}), __builtin_shuffle(a, b, I{1, 3, 5, 7, 9, 11, 13, 15})};
}

// A result much larger than the cache goes around it: an ordinary store would first read the line it overwrites.
template <bool STREAM>
INLINE void write(void* p, const void* from, int bytes) {
#ifdef __SSE2__
  if (STREAM) {
    for (int k = 0; k < bytes; k += 16) {
      __m128i x;
      memcpy(&x, (const char*)from + k, 16);
      _mm_stream_si128((__m128i*)((char*)p + k), x);
    }
    return;
  }
#endif
  memcpy(p, from, bytes);
}

template <bool SPLIT, bool STREAM = false, bool CAREFUL = true>
INLINE void store(void* p, int type, int64_t i, Pair f) {
  if (!SPLIT && type == AFD_F16) {
    H both[2] = {narrow_f16(f.x[0]), narrow_f16(f.x[1])};
    write<STREAM>((uint16_t*)p + i, both, sizeof both);
    return;
  }
  if (SPLIT && type == AFD_BF16) {
    U u = round_bf16<CAREFUL>(f.x[0]) >> 16 | round_bf16<CAREFUL>(f.x[1]);
    write<STREAM>((uint16_t*)p + i, &u, sizeof u);
    return;
  }
  if (SPLIT && type == AFD_F16) {
    U u = to_f16(f.x[0]) | to_f16(f.x[1]) << 16;
    write<STREAM>((uint16_t*)p + i, &u, sizeof u);
    return;
  }
  F a = f.x[0], b = f.x[1];
  if (SPLIT) {
    a = __builtin_shuffle(f.x[0], f.x[1], I{0, 8, 1, 9, 2, 10, 3, 11});
    b = __builtin_shuffle(f.x[0], f.x[1], I{4, 12, 5, 13, 6, 14, 7, 15});
  }
  write<STREAM>((float*)p + i, &a, sizeof a);
  write<STREAM>((float*)p + i + W, &b, sizeof b);
}

INLINE F magnitude(F f) { return (F)((U)f & 0x7FFFFFFF); }
