// The adaptive recipes in ONE launch: a cluster of thread blocks owns a sample, sums it, shares the sums through
// distributed shared memory, and reads the sample a second time (from L2) for the gradient. sm_90a, plain C interface.
//
// Opt-in and UNMEASURED: it has never run on a GPU. It stays only if it is 10 % faster there than the two Triton sweeps.
// Serves: x0 or velocity space, x_t or noise given, one t a sample, one dtype for all tensors, no element mask, not packed.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "afd_core.h"

namespace cg = cooperative_groups;
enum { CLUSTER = 8, THREADS = 512, VECTOR = 8, SUMMED = S_PRIOR + 1, COEFFICIENTS = AFD_ROWS - R_DIFFERENCE };

__device__ __forceinline__ void load(const float* p, float* f) {
  float4 a = *(const float4*)p, b = *((const float4*)p + 1);
  f[0] = a.x; f[1] = a.y; f[2] = a.z; f[3] = a.w; f[4] = b.x; f[5] = b.y; f[6] = b.z; f[7] = b.w;
}
__device__ __forceinline__ void load(const __nv_bfloat16* p, float* f) {
  uint4 u = *(const uint4*)p;
  uint32_t w[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
  for (int i = 0; i < 4; i++) f[2 * i] = __uint_as_float(w[i] << 16), f[2 * i + 1] = __uint_as_float(w[i] & 0xFFFF0000u);
}
__device__ __forceinline__ void store(float* p, const float* f) {
  __stcs((float4*)p, make_float4(f[0], f[1], f[2], f[3]));
  __stcs((float4*)p + 1, make_float4(f[4], f[5], f[6], f[7]));
}
__device__ __forceinline__ void store(__nv_bfloat16* p, const float* f) {
  uint32_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    __nv_bfloat162 h = __floats2bfloat162_rn(f[2 * i], f[2 * i + 1]);
    w[i] = *(uint32_t*)&h;
  }
  __stcs((uint4*)p, make_uint4(w[0], w[1], w[2], w[3]));
}
__device__ __forceinline__ float rounded(float x, const float*) { return x; }
__device__ __forceinline__ float rounded(float x, const __nv_bfloat16*) { return __bfloat162float(__float2bfloat16_rn(x)); }

template <typename S, bool OLD, bool REF>
struct Eight {
  float v[VECTOR], x0[VECTOR], y[VECTOR], old[VECTOR], ref[VECTOR];

  __device__ __forceinline__ Eight(const AfdCall& c, int64_t b, int64_t i, float t) {
    load((const S*)c.v + b * c.v_stride + i, v);
    load((const S*)c.x0 + b * c.x0_stride + i, x0);
    load((const S*)c.y + b * c.y_stride + i, y);
    if (OLD) load((const S*)c.v_old + b * c.old_stride + i, old);
    if (REF) load((const S*)c.v_ref + b * c.ref_stride + i, ref);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {  // y becomes w
      if (c.x0_space) y[j] = (c.source == AFD_XT ? y[j] : rounded(afd_madd(1.0f - t, x0[j], afd_mul(t, y[j])), (const S*)0)) - x0[j];
      else y[j] = c.source == AFD_XT ? (x0[j] - y[j]) / t : x0[j] - y[j];
    }
  }
  __device__ __forceinline__ AfdElement<float> at(int j, const AfdConstants& k) const {
    return afd_element<OLD, float>(v[j], y[j], OLD ? old[j] : v[j], REF ? ref[j] : v[j], k);
  }
};

template <typename S, bool OLD, bool REF>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS) one_launch(AfdCall c, AfdTerms* terms, unsigned* ticket) {
  cg::cluster_group cluster = cg::this_cluster();
  int64_t b = blockIdx.y, first = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * VECTOR, step = (int64_t)CLUSTER * THREADS * VECTOR;
  float t = c.t[b], sigma = c.sigma ? c.sigma[b] : t;
  AfdConstants k = afd_constants(c, b, sigma);  // its coefficients are not known yet
  float acc[SUMMED] = {};
  for (int64_t i = first; i < c.count; i += step) {
    Eight<S, OLD, REF> e(c, b, i, t);
#pragma unroll
    for (int j = 0; j < VECTOR; j++) {
      AfdElement<float> x = e.at(j, k);
      float pos = x.a + x.d, neg = x.a - x.d, size = fabsf(pos);
      acc[S_SIZE] += size; acc[S_SIZE_GAP] += size - fabsf(neg);
      acc[S_POS] += pos * pos; acc[S_NEG] += neg * neg; acc[S_PRIOR] += x.gap * x.gap;
    }
  }
  __shared__ double warps[SUMMED][THREADS / 32], mine[SUMMED];
  __shared__ float coefficients[COEFFICIENTS];
#pragma unroll
  for (int s = 0; s < SUMMED; s++) {
    double x = acc[s];
    for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(~0u, x, m);
    if (threadIdx.x % 32 == 0) warps[s][threadIdx.x / 32] = x;
  }
  __syncthreads();
  if (threadIdx.x < SUMMED) {
    double x = 0;
    for (int w = 0; w < THREADS / 32; w++) x += warps[threadIdx.x][w];
    mine[threadIdx.x] = x;
  }
  cluster.sync();
  if (threadIdx.x == 0) {  // every block adds the cluster's sums in the same order
    double sums[AFD_SLOTS] = {};
    for (int rank = 0; rank < CLUSTER; rank++)
      for (int s = 0; s < SUMMED; s++) sums[s] += cluster.map_shared_rank(mine, rank)[s];
    if (cluster.block_rank() == 0) terms[b] = afd_sample(c, afd_batch(c, nullptr), b, sums, 1, true);
  }
  __threadfence();
  cluster.sync();  // rows are written; nobody leaves while its shared memory is read
  if (threadIdx.x < COEFFICIENTS) coefficients[threadIdx.x] = ((volatile float*)c.rows)[(R_DIFFERENCE + threadIdx.x) * c.samples + b];
  __syncthreads();
  k.difference = k.s * coefficients[0] * c.scale; k.total = k.s * coefficients[R_SUM - R_DIFFERENCE] * c.scale;
  k.reference = k.gap * coefficients[R_REFERENCE - R_DIFFERENCE] * c.prior_scale;
  for (int64_t i = first; i < c.count; i += step) {
    Eight<S, OLD, REF> e(c, b, i, t);
    float g[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; j++) g[j] = e.at(j, k).grad;
    store((S*)c.grad + b * c.grad_stride + i, g);
  }
  if (threadIdx.x == 0 && cluster.block_rank() == 0 && atomicInc(ticket, (unsigned)c.samples - 1) == c.samples - 1) {
    __threadfence();  // the last sample adds the batch, in order; the ticket is back at zero
    AfdTerms sum = {0, 0, 0, 0};
    for (int64_t i = 0; i < c.samples; i++) {
      const volatile AfdTerms& x = terms[i];
      sum.policy += x.policy; sum.prior += x.prior; sum.signal += x.signal; sum.r += x.r;
    }
    afd_total(c, sum);
  }
}

template <typename S>
static int launch(const AfdCall& c, AfdTerms* terms, unsigned* ticket, cudaStream_t stream) {
  dim3 grid(CLUSTER, (unsigned)c.samples);
  if (c.v_old && c.v_ref) one_launch<S, true, true><<<grid, THREADS, 0, stream>>>(c, terms, ticket);
  else if (c.v_old) one_launch<S, true, false><<<grid, THREADS, 0, stream>>>(c, terms, ticket);
  else if (c.v_ref) one_launch<S, false, true><<<grid, THREADS, 0, stream>>>(c, terms, ticket);
  else one_launch<S, false, false><<<grid, THREADS, 0, stream>>>(c, terms, ticket);
  return (int)cudaGetLastError();
}

extern "C" {
#define EXPORT __attribute__((visibility("default")))
EXPORT int afd_cuda_abi() { return sizeof(AfdCall); }
EXPORT const char* afd_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }

// Loss, totals, rows and the gradient. terms: 4 doubles a sample; ticket: one unsigned, zero before the first call.
// cudaErrorNotSupported for a call outside what the file's head lists.
EXPORT int afd_cuda_nft_loss(const AfdCall* c, void* terms, unsigned* ticket, void* stream) {
  bool same = c->x0_type == c->v_type && c->y_type == c->v_type && c->grad_type == c->v_type &&
              (!c->v_old || c->old_type == c->v_type) && (!c->v_ref || c->ref_type == c->v_type);
  int64_t strides = c->v_stride | c->x0_stride | c->y_stride | c->old_stride | c->ref_stride | c->grad_stride | c->count;
  uintptr_t pointers = (uintptr_t)c->v | (uintptr_t)c->x0 | (uintptr_t)c->y | (uintptr_t)c->v_old | (uintptr_t)c->v_ref | (uintptr_t)c->grad;
  if (!same || strides % VECTOR || pointers % 16 || c->mask || c->weight || c->each || c->cu || c->frames != 1 || c->source == AFD_SEED || c->source == AFD_CLEAN || c->stats ||
      (c->v_type != AFD_F32 && c->v_type != AFD_BF16) ||
      c->samples < 1 || c->samples > 65535)
    return (int)cudaErrorNotSupported;
  auto run = c->v_type == AFD_BF16 ? launch<__nv_bfloat16> : launch<float>;
  return run(*c, (AfdTerms*)terms, ticket, (cudaStream_t)stream);
}
}
