// The CPU library: C ABI, OpenMP over tiles of 4096 elements, 8-float vectors, one clone per instruction set.
// Sums are taken in a fixed order whatever the number of threads and the instruction set.
#include <algorithm>
#include <vector>

#include "afd_vectors.h"

CLONES static void noise_tile(float* e, uint32_t tile, uint32_t sample, int64_t seed) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)((uint64_t)seed >> 32);
#pragma GCC ivdep
  for (int q = 0; q < AFD_QUARTER; q++) {
    AfdWords r = afd_philox(tile * AFD_QUARTER + q, sample, 0, 0, k0, k1);
    afd_box_muller(r.x, r.y, e[q], e[q + AFD_QUARTER]);
    afd_box_muller(r.z, r.w, e[q + 2 * AFD_QUARTER], e[q + 3 * AFD_QUARTER]);
  }
}

struct Run {  // elements with one t and sigma
  const char *v, *x0, *y, *old, *ref;
  const uint8_t* mask;
  const float *weight, *each;
  char* grad;
  int64_t n;
  int32_t y_type;
  bool stream;
  float t;
  AfdConstants k;
  F acc[AFD_SLOTS];
};

INLINE F larger(F a, F b) { return (F)pick(a > b, (U)a, (U)b); }

// TYPE: what all tensors are (x0 and y may be float32 among 16-bit ones), or ANY; then masks are possible too. OLD: whether there is
// a v_old. SUMS: none, those of the loss, or with the statistics. SAME_F32: float32 with the sums in ANY's order.
enum { ANY = -1, SAME_F32 = 3, STEP = 2 * W, LOSS = 1, STATS = 2, CACHED = 3 << 19 };
template <int TYPE, bool OLD, bool GRAD, int SUMS>
INLINE void step(const AfdCall& c, Run& u, int64_t i) {
  constexpr bool SPLIT = TYPE != AFD_F32 && TYPE != AFD_F16, HALF = TYPE == AFD_BF16 || TYPE == AFD_F16;
  auto type = [](int of) { return TYPE == ANY ? of : TYPE == SAME_F32 ? (int)AFD_F32 : TYPE; };
  auto state = [&](int of) { return HALF && of == AFD_F32 ? of : type(of); };  // x0 and y may be float32 among 16-bit numbers
  Pair V = load<SPLIT>(u.v, type(c.v_type), i), X = load<SPLIT>(u.x0, state(c.x0_type), i), R = V, G;
  Pair Y = load<SPLIT>(u.y, state(u.y_type), i), O = OLD ? load<SPLIT>(u.old, type(c.old_type), i) : V;
  if (u.ref) R = load<SPLIT>(u.ref, type(c.ref_type), i);
  auto ahead = [&](const char* p, int of) {  // 0.8 of the time without (one core, 2 Mi elements of float32)
    if (TYPE != ANY && p) __builtin_prefetch(at(p, of, i) + 2048);
  };
  ahead(u.v, type(c.v_type)); ahead(u.x0, state(c.x0_type)); ahead(u.y, state(u.y_type)); ahead(u.ref, type(c.ref_type));
  if (OLD) ahead(u.old, type(c.old_type));
  U bytes = {};
  Pair M = {}, E = {};
  if (TYPE == ANY && u.mask) {
    H pairs;
    memcpy(&pairs, u.mask + i, sizeof pairs);
    bytes = __builtin_convertvector(pairs, U);
  }
  if (TYPE == ANY && u.weight) M = load<SPLIT>(u.weight, AFD_F32, i);
  if (TYPE == ANY && u.each) E = load<SPLIT>(u.each, AFD_F32, i);
  for (int half = 0; half < 2; half++) {
    F v = V.x[half], x0 = X.x[half], y = Y.x[half], old = O.x[half], ref = R.x[half], ones = F{} + 1.0f;
    F r = E.x[half];
    if (TYPE == ANY && (u.mask || u.weight)) {
      I keep = u.mask ? ((bytes >> 8 * half) & 0xFF) != 0 : M.x[half] != 0.0f;
      v = (F)((I)v & keep); x0 = (F)((I)x0 & keep); y = (F)((I)y & keep);
      old = (F)((I)old & keep); ref = (F)((I)ref & keep); r = (F)((I)r & keep);
      ones = u.mask ? (F)((I)ones & keep) : M.x[half];
    }
    bool weighted = TYPE == ANY && u.weight;
    auto weigh = [&](F f) { return weighted ? ones * f : f; };
    F w;
    if (c.x0_space) {
      if (c.source != AFD_XT) {
        y = (1.0f - u.t) * x0 + u.t * y;
        if (state(c.x0_type) != AFD_F32) y = rounded<SPLIT, TYPE == ANY>(y, state(c.x0_type));  // as the network saw it
      }
      w = y - x0;
    } else {
      w = c.source == AFD_XT ? (x0 - y) / u.t : c.source == AFD_CLEAN ? -y : x0 - y;
    }
    AfdElement<F> x = afd_element<OLD, F>(v, w, old, ref, u.k);
    G.x[half] = weigh(TYPE == ANY && u.each ? afd_dense_gradient<F>(x, r, u.k, c.ref_by_r) : x.grad);
    if (SUMS) {
      F pos = OLD ? x.a + x.d : x.a;
      F gap = weigh(x.gap * x.gap), pos_square = weigh(pos * pos);
      u.acc[S_POS] += pos_square;
      u.acc[S_PRIOR] += gap;
      F neg = OLD ? x.a - x.d : x.a, neg_square = OLD ? weigh(neg * neg) : pos_square;
      if (OLD) u.acc[S_NEG] += neg_square;
      if (c.adaptive) {
        u.acc[S_SIZE] += weigh(magnitude(pos));
        if (OLD) u.acc[S_SIZE_GAP] += weigh(magnitude(pos) - magnitude(neg));
      }
      if (TYPE == ANY) u.acc[S_KEPT] += ones;
      if (TYPE == ANY && u.each) {
        u.acc[S_R_POS] += r * pos_square; u.acc[S_R_NEG] += (1.0f - r) * neg_square;
        u.acc[S_R_PRIOR] += r * gap; u.acc[S_R] += ones * r;
      }
      if (SUMS == STATS) {
        F drift = (v - old) * (v - old), clean = x0 * x0;
        if (OLD) u.acc[S_DRIFT] += weigh(drift), u.acc[S_DRIFT_MAX] = larger(drift, u.acc[S_DRIFT_MAX]);
        u.acc[S_V] += v * v;
        u.acc[S_X0] += weigh(clean);
        u.acc[S_X0_MAX] = larger(clean, u.acc[S_X0_MAX]);
        if (u.ref) u.acc[S_REF] += ref * ref, u.acc[S_OLD_REF] += weigh((old - ref) * (old - ref));
      }
    }
  }
  if (GRAD && u.stream) store<SPLIT, true, TYPE == ANY>(u.grad, type(c.grad_type), i, G);
  if (GRAD && !u.stream) store<SPLIT, false, TYPE == ANY>(u.grad, type(c.grad_type), i, G);
}

template <int TYPE, bool OLD, bool GRAD, int SUMS>
INLINE void run(const AfdCall& given, const Run& start, double* part) {
  const AfdCall c = given;  // copies: a store through char* could alias the originals
  Run u = start;
  for (F& a : u.acc) a = F{};
  int64_t i = 0;
  for (; i + STEP <= u.n; i += STEP) step<TYPE, OLD, GRAD, SUMS>(c, u, i);
  if (int64_t rest = u.n - i) {  // the last elements, padded with zeros that add nothing
    alignas(64) char v[64] = {}, x0[64] = {}, y[64] = {}, old[64] = {}, ref[64] = {}, grad[64];
    alignas(64) float weight[STEP] = {}, each[STEP] = {};
    alignas(16) uint8_t mask[STEP] = {};
    Run tail = u;
    auto copy = [&](char* to, const char*& from, int type) {
      if (from) memcpy(to, at(from, type, i), rest * size_of(type)), from = to;
    };
    copy(v, tail.v, c.v_type); copy(x0, tail.x0, c.x0_type); copy(y, tail.y, u.y_type);
    copy(old, tail.old, c.old_type); copy(ref, tail.ref, c.ref_type);
    if (u.mask) memcpy(mask, u.mask + i, rest), tail.mask = mask;
    if (u.weight) memcpy(weight, u.weight + i, rest * sizeof *weight), tail.weight = weight;
    if (u.each) memcpy(each, u.each + i, rest * sizeof *each), tail.each = each;
    tail.grad = grad;
    tail.stream = false;
    step<TYPE, OLD, GRAD, SUMS>(c, tail, 0);
    if (GRAD) memcpy(u.grad + i * size_of(c.grad_type), grad, rest * size_of(c.grad_type));
    for (int k = 0; k < AFD_SLOTS; k++) u.acc[k] = tail.acc[k];
  }
  if (!SUMS) return;
  for (int k = 0; k < AFD_SLOTS; k++) for (int j = 0; j < W; j++) part[k] = afd_join(k, part[k], u.acc[k][j]);
  if (!OLD) part[S_NEG] = part[S_POS];
}

typedef void Runner(const AfdCall&, const Run&, double*);
#define CODE_AFD_F32 CLONES
#define CODE_AFD_BF16 CLONES
#define CODE_AFD_F16 F16_CODE
#define CODE_SAME_F32 CLONES
#define CODE_ANY CLONES
#define RUNNER(NAME, TYPE, OLD, GRAD, SUMS) \
  CODE_##TYPE static void NAME(const AfdCall& c, const Run& u, double* p) { run<TYPE, OLD, GRAD, SUMS>(c, u, p); }
#define RUNNERS(NAME, TYPE, OLD)             \
  RUNNER(NAME##_sums, TYPE, OLD, 0, LOSS)    \
  RUNNER(NAME##_grad, TYPE, OLD, 1, 0)       \
  RUNNER(NAME##_both, TYPE, OLD, 1, LOSS)    \
  static Runner* const NAME[] = {NAME##_grad, NAME##_sums, NAME##_both};
#define STATS_RUNNERS(NAME, TYPE, OLD)       \
  RUNNER(NAME##_sums, TYPE, OLD, 0, STATS)   \
  RUNNER(NAME##_both, TYPE, OLD, 1, STATS)   \
  static Runner* const NAME[] = {nullptr, NAME##_sums, NAME##_both};
RUNNERS(f32_new, AFD_F32, false)
RUNNERS(f32_old, AFD_F32, true)
RUNNERS(bf16_new, AFD_BF16, false)
RUNNERS(bf16_old, AFD_BF16, true)
RUNNERS(f16_old, AFD_F16, true)
RUNNERS(any_new, ANY, false)
RUNNERS(any_old, ANY, true)
STATS_RUNNERS(f32_old_stats, SAME_F32, true)
STATS_RUNNERS(bf16_old_stats, AFD_BF16, true)
STATS_RUNNERS(f16_old_stats, AFD_F16, true)
STATS_RUNNERS(any_new_stats, ANY, false)
STATS_RUNNERS(any_old_stats, ANY, true)

static Runner* choose(const AfdCall& c, bool grad, bool sums) {
  int type = c.v_type;
  auto state = [&](int of) { return of == type || of == AFD_F32; };
  bool same = state(c.x0_type) && (!c.v_old || c.old_type == type) && (!c.v_ref || c.ref_type == type) &&
              (!grad || c.grad_type == type) && (c.source == AFD_SEED || state(c.y_type)) && (type != AFD_F16 || f16_code);
  enum { MIXED = 3 };
  static Runner* const* const plain[][2] = {{f32_new, f32_old}, {bf16_new, bf16_old}, {any_new, f16_old}, {any_new, any_old}};
  static Runner* const* const stats[][2] = {{any_new_stats, f32_old_stats}, {any_new_stats, bf16_old_stats},
                                            {any_new_stats, f16_old_stats}, {any_new_stats, any_old_stats}};
  auto row = (c.stats && sums ? stats : plain)[c.mask || c.weight || c.each || !same ? (int)MIXED : type];
  return row[c.v_old != nullptr][!sums ? 0 : grad ? 2 : 1];
}

// One pass over the tensors: which tiles a sample has (first[b] .. first[b + 1]), and what runs over them.
struct Sweep {
  const AfdCall& c;
  bool grad, sums, stream;
  Runner* runner;
  std::vector<int64_t> first;

  Sweep(const AfdCall& call, bool grad, bool sums)
      : c(call), grad(grad), sums(sums), stream(c.samples * c.count * size_of(c.grad_type) > (16 << 20)),
        runner(choose(c, grad, sums)), first(c.samples + 1, 0) {
    for (int64_t b = 0; b < c.samples; b++) first[b + 1] = first[b] + (length(b) + AFD_TILE - 1) / AFD_TILE;
  }

  int64_t length(int64_t b) const { return (c.cu ? c.cu[b + 1] - c.cu[b] : 1) * c.count; }

  void run(int64_t tile, int64_t b) const {
    int64_t begin = (tile - first[b]) * AFD_TILE, end = std::min<int64_t>(begin + AFD_TILE, length(b));
    int64_t row = c.cu ? c.cu[b] : b;
    alignas(64) float eps[AFD_TILE];
    if (c.source == AFD_SEED) noise_tile(eps, (uint32_t)(tile - first[b]), (uint32_t)b, c.seed);
    double none[AFD_SLOTS], *part = sums ? c.part + tile * AFD_SLOTS : none;
    std::fill(part, part + AFD_SLOTS, 0.0);
    for (int64_t i = begin; i < end;) {
      int64_t frame = i / c.inner, stop = std::min(end, (frame + 1) * c.inner), k = b * c.frames + frame % c.frames;
      Run u;
      auto from = [&](const void* p, int type, int64_t stride) { return p ? at(p, type, row * stride + i) : nullptr; };
      u.v = from(c.v, c.v_type, c.v_stride); u.x0 = from(c.x0, c.x0_type, c.x0_stride);
      u.y = c.source == AFD_SEED ? (const char*)(eps + (i - begin)) : from(c.y, c.y_type, c.y_stride);
      u.old = from(c.v_old, c.old_type, c.old_stride); u.ref = from(c.v_ref, c.ref_type, c.ref_stride);
      u.mask = c.mask ? c.mask + row * c.mask_stride + i : nullptr;
      u.weight = c.weight ? c.weight + row * c.mask_stride + i : nullptr;
      u.each = c.each ? c.each + row * c.mask_stride + i : nullptr;
      u.grad = (char*)(grad ? from(c.grad, c.grad_type, c.grad_stride) : nullptr);
      u.y_type = c.source == AFD_SEED ? (int)AFD_F32 : c.y_type;
      u.stream = stream && (uintptr_t)u.grad % 16 == 0;
      u.n = stop - i; u.t = c.t[k]; u.k = afd_constants(c, b, c.sigma ? c.sigma[k] : c.t[k]);
      double add[AFD_SLOTS] = {};
      runner(c, u, add);
      for (int s = 0; s < AFD_SLOTS; s++) part[s] = afd_join(s, part[s], add[s]);
      i = stop;
    }
  }

  void add_up(int64_t b) const {
    for (int k = 0; k < AFD_SLOTS; k++) {
      double total = 0;
      for (int64_t tile = first[b]; tile < first[b + 1]; tile++) total = afd_join(k, total, c.part[tile * AFD_SLOTS + k]);
      c.sums[k * c.samples + b] = total;
    }
  }

  void run_sample(int64_t b) const {
    for (int64_t tile = first[b]; tile < first[b + 1]; tile++) run(tile, b);
    if (sums) add_up(b);
  }

  void run_all() const {
#pragma omp parallel for schedule(dynamic, 16) num_threads(c.threads)  // a busy core takes fewer
    for (int64_t tile = 0; tile < first[c.samples]; tile++)
      run(tile, std::upper_bound(first.begin(), first.end(), tile) - first.begin() - 1);
    if (sums) for (int64_t b = 0; b < c.samples; b++) add_up(b);
  }
};

// The sums of a sample and then its gradient, while it is in the cache. Not where the coefficients need another sample's sums, or a
// thread would have none.
static bool by_sample(const AfdCall& c) {
  int64_t bytes = c.count * size_of(c.v_type) * (2 + (c.y != nullptr) + (c.v_old != nullptr) + (c.v_ref != nullptr));
  return bytes <= CACHED && c.samples >= c.threads && !c.cu && !((c.mask || c.weight) && c.ref_batch);
}

extern "C" {
#define EXPORT __attribute__((visibility("default")))

EXPORT int afd_abi() { return sizeof(AfdCall); }

// Loss, totals and rows; with c->grad also the gradient times c->scale, in the same sweep where it needs no sums first.
EXPORT void afd_nft_loss(const AfdCall* call) {
  const AfdCall& c = *call;
  bool grad = c.grad, sums_first = grad && (c.adaptive || c.dpo || ((c.mask || c.weight) && (c.sample_mean || c.ref_batch)));
  if (sums_first && by_sample(c)) {
    Sweep sums(c, false, true), gradient(c, true, false);
    AfdBatch batch = afd_batch(c, nullptr);
#pragma omp parallel for schedule(dynamic, 1) num_threads(c.threads)
    for (int64_t b = 0; b < c.samples; b++) {
      sums.run_sample(b);
      afd_sample(c, batch, b, c.sums + b, c.samples, false);
      gradient.run_sample(b);
    }
    afd_finish(c, true);
    return;
  }
  if (grad && !sums_first) afd_finish(c, false);
  Sweep(c, grad && !sums_first, true).run_all();
  afd_finish(c, true);
  if (sums_first) Sweep(c, true, false).run_all();
}

// The gradient times c->scale from the coefficients in c->rows.
EXPORT void afd_nft_gradient(const AfdCall* c) { Sweep(*c, true, false).run_all(); }

// x_t [B, ...] contiguous into c->grad = (1 - t) x0 + t eps.
static void noised(const AfdCall& c, int64_t tile, int64_t b, int64_t begin, int64_t end);
EXPORT void afd_forward_noise(const AfdCall* c) {
  int64_t tiles = (c->count + AFD_TILE - 1) / AFD_TILE;
#pragma omp parallel for schedule(static) num_threads(c->threads)
  for (int64_t i = 0; i < tiles * c->samples; i++) {
    int64_t tile = i % tiles;
    noised(*c, tile, i / tiles, tile * AFD_TILE, std::min<int64_t>((tile + 1) * AFD_TILE, c->count));
  }
}
}

CLONES static void blend(void* out, int type, const void* x0, const void* y, int y_type, float t, int64_t n) {
  float s = 1.0f - t;
  auto mix = [&](const void* x0, const void* y, void* out, int64_t i) {
    Pair a = load<true>(x0, type, i), b = load<true>(y, y_type, i);
    for (int half = 0; half < 2; half++) a.x[half] = s * a.x[half] + t * b.x[half];
    store<true>(out, type, i, a);
  };
  int64_t i = 0;
  for (; i + STEP <= n; i += STEP) mix(x0, y, out, i);
  if (int64_t rest = n - i) {
    alignas(64) char a[64] = {}, b[64] = {}, o[64];
    memcpy(a, at(x0, type, i), rest * size_of(type));
    memcpy(b, at(y, y_type, i), rest * size_of(y_type));
    mix(a, b, o, 0);
    memcpy((char*)out + i * size_of(type), o, rest * size_of(type));
  }
}

static void noised(const AfdCall& c, int64_t tile, int64_t b, int64_t begin, int64_t end) {
  alignas(64) float eps[AFD_TILE];
  bool seed = c.source == AFD_SEED;
  if (seed) noise_tile(eps, (uint32_t)tile, (uint32_t)b, c.seed);
  for (int64_t i = begin; i < end;) {
    int64_t frame = i / c.inner, stop = std::min(end, (frame + 1) * c.inner);
    const void* y = seed ? (const void*)(eps + (i - begin)) : at(c.y, c.y_type, b * c.y_stride + i);
    void* out = (char*)c.grad + (b * c.grad_stride + i) * size_of(c.x0_type);
    blend(out, c.x0_type, at(c.x0, c.x0_type, b * c.x0_stride + i), y, seed ? (int)AFD_F32 : c.y_type,
          c.t[b * c.frames + frame % c.frames], stop - i);
    i = stop;
  }
}
