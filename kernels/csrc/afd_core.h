// The arithmetic, once: noise, the loss's element and its per-sample finish. g++ compiles it for CPUs (F = a vector of
// 8 floats), nvcc for sm_90a (F = float). The same equations as kernels/afd_kernels/nft.py and noise.py.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define AFD_HD __host__ __device__ __forceinline__
#else
#define AFD_HD static inline __attribute__((always_inline))
#endif

enum { AFD_QUARTER = 1024, AFD_TILE = 4096 };
// The names and numbers of kernels/afd_kernels/layout.py: slots of the sums, rows of the result, totals, sources.
enum AfdSlot { S_SIZE, S_SIZE_GAP, S_POS, S_NEG, S_PRIOR, S_KEPT, S_DRIFT, S_V, S_REF, S_X0, S_OLD_REF,
               S_R_POS, S_R_NEG, S_R_PRIOR, S_R, S_X0_MAX, S_DRIFT_MAX, AFD_SLOTS };
enum AfdRow { R_POS_LOSS, R_NEG_LOSS, R_WEIGHT_POS, R_WEIGHT_NEG, R_PRIOR, R_OLD_DEVIATION, R_V_NORM, R_V_REF_NORM,
              R_OLD_DEVIATION_MAX, R_OLD_PRIOR, R_X0_SQUARE, R_X0_SQUARE_MAX, R_DIFFERENCE, R_SUM, R_REFERENCE, AFD_ROWS };
enum AfdTotal { T_POLICY, T_PRIOR, T_SIGNAL, T_R_MEAN };
enum AfdSource { AFD_NOISE, AFD_SEED, AFD_XT, AFD_CLEAN };
enum { AFD_F32 = 0, AFD_BF16 = 1, AFD_F16 = 2 };

// One call; plain C so that ctypes can fill it. Strides count elements between samples; null means absent.
struct AfdCall {
  const void *v, *x0, *y, *v_old, *v_ref;           // y: noise or x_t; null with AFD_SEED, x0 with AFD_CLEAN
  void* grad;
  const uint8_t* mask;                              // elements that count, or
  const float *weight, *each;                       // their weights; r per element
  const float *t, *sigma;                           // [B, F]; sigma null is t
  const int64_t* cu;                                // packed rows [B + 1]
  const float *r, *valid, *chosen;                  // [B]; masks as 0 / 1 or as weights; r is not read next to each
  const float *policy_weight, *prior_weight;        // [B]
  float* rows;                                      // [AFD_ROWS, B]; the gradient reads its last three
  float *loss, *totals;                             // [1], [4]
  double* sums;                                     // [AFD_SLOTS, B]
  double* part;                                     // [tiles, AFD_SLOTS]
  int64_t v_stride, x0_stride, y_stride, old_stride, ref_stride, grad_stride, mask_stride; // the last also of weight and each
  int64_t samples, count, frames, inner, tiles, seed; // count: elements of a sample, or of a packed row
  int32_t v_type, x0_type, y_type, old_type, ref_type, grad_type;
  int32_t source, x0_space, ref_x0, adaptive, sample_mean, batch_mean, ref_by_r, empty_all, stats, threads;
  int32_t shared, dpo, ref_batch;
  double ref_coef, factor, floor, dpo_beta;
  float beta, scale, prior_scale;                   // the scales: grad_output of policy and prior
};

#ifdef __CUDA_ARCH__  // never contracted into FMA: noise has the same bits everywhere
AFD_HD float afd_mul(float a, float b) { return __fmul_rn(a, b); }
AFD_HD float afd_add(float a, float b) { return __fadd_rn(a, b); }
AFD_HD float afd_sqrt(float a) { return __fsqrt_rn(a); }
AFD_HD double afd_sqrt64(double a) { return sqrt(a); }
AFD_HD float afd_float(uint32_t u) { return __uint_as_float(u); }
AFD_HD uint32_t afd_bits(float f) { return __float_as_uint(f); }
AFD_HD uint32_t afd_mulhi(uint32_t a, uint32_t b) { return __umulhi(a, b); }
#else  // -ffp-contract=off
AFD_HD float afd_mul(float a, float b) { return a * b; }
AFD_HD float afd_add(float a, float b) { return a + b; }
AFD_HD float afd_sqrt(float a) { return __builtin_sqrtf(a); }
AFD_HD double afd_sqrt64(double a) { return __builtin_sqrt(a); }
AFD_HD float afd_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
AFD_HD uint32_t afd_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
AFD_HD uint32_t afd_mulhi(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }
#endif

struct AfdWords { uint32_t x, y, z, w; };

AFD_HD AfdWords afd_philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int i = 0; i < 10; i++) {
    uint32_t h0 = afd_mulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    uint32_t h1 = afd_mulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0; c2 = h0 ^ c3 ^ k1; c1 = l1; c3 = l0;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  return {c0, c1, c2, c3};
}

AFD_HD float afd_madd(float a, float b, float c) { return afd_add(afd_mul(a, b), c); }

// Box-Muller from IEEE float32 + - *, a correctly rounded square root and integers (Cephes logf, sinf, cosf).
AFD_HD void afd_box_muller(uint32_t a, uint32_t b, float& first, float& second) {
  float u = afd_madd((float)a, 2.3283064365386963e-10f, 1.1641532182693481e-10f);
  int32_t bits = (int32_t)afd_bits(u), exponent = (bits - 0x3F3504F3) >> 23;
  float f = afd_add(afd_float((uint32_t)(bits - (int32_t)((uint32_t)exponent << 23))), -1.0f), z = afd_mul(f, f);
  float p = afd_madd(7.0376836292e-2f, f, -1.1514610310e-1f);
  p = afd_madd(p, f, 1.1676998740e-1f); p = afd_madd(p, f, -1.2420140846e-1f); p = afd_madd(p, f, 1.4249322787e-1f);
  p = afd_madd(p, f, -1.6668057665e-1f); p = afd_madd(p, f, 2.0000714765e-1f);
  p = afd_madd(p, f, -2.4999993993e-1f); p = afd_madd(p, f, 3.3333331174e-1f);
  float e = (float)exponent, y = afd_mul(afd_mul(p, f), z);
  y = afd_add(y, afd_mul(e, -2.12194440e-4f));
  y = afd_add(y, -afd_mul(0.5f, z));
  float s = afd_mul(-2.0f, afd_add(afd_add(f, y), afd_mul(e, 0.693359375f)));
  float radius = afd_sqrt(s > 0.0f ? s : 0.0f);
  uint32_t quadrant = (b + 0x20000000u) >> 30;
  float x = afd_mul((float)(int32_t)(b - (quadrant << 30)), 1.4629180792671596e-09f), x2 = afd_mul(x, x);
  float sine = afd_madd(afd_madd(-1.9515295891e-4f, x2, 8.3321608736e-3f), x2, -1.6666654611e-1f);
  sine = afd_madd(afd_mul(sine, x2), x, x);
  float cosine = afd_madd(afd_madd(2.443315711809948e-5f, x2, -1.388731625493765e-3f), x2, 4.166664568298827e-2f);
  cosine = afd_add(afd_mul(afd_mul(cosine, x2), x2), afd_add(1.0f, -afd_mul(0.5f, x2)));
  bool odd = quadrant & 1;
  float c = odd ? sine : cosine, d = odd ? cosine : sine;
  first = afd_mul(radius, afd_float(afd_bits(c) ^ (((quadrant + 1) & 2) << 30)));  // sign flips
  second = afd_mul(radius, afd_float(afd_bits(d) ^ ((quadrant & 2) << 30)));
}

// What is constant while t and sigma are: s = 1 (velocity space) or -sigma (x0 space), gap = 1 or sigma.
struct AfdConstants { float s, step, gap, difference, total, reference; };

AFD_HD AfdConstants afd_constants(const AfdCall& c, int64_t sample, float sigma) {
  const float* row = c.rows + sample;
  float s = c.x0_space ? -sigma : 1.0f, gap = c.ref_x0 ? sigma : 1.0f;
  return {s, s * c.beta, gap, s * row[R_DIFFERENCE * c.samples] * c.scale, s * row[R_SUM * c.samples] * c.scale,
          gap * row[R_REFERENCE * c.samples] * c.prior_scale};
}

// w = x0 - eps, x_t - x0, or -x0 (AFD_CLEAN). a = s v_old + w, d = s beta (v - v_old), e+- = a +- d; old is v where there is no v_old.
// dL/dv = s [(c+ - c-) a + (c+ + c-) d] + c_ref m (v - v_ref): nothing cancels at zero advantage.
// With an r per element, k.difference is c+ at r = 1 and k.total c- at r = 0.
template <class F> struct AfdElement { F a, d, gap, grad; };

template <bool OLD, class F>
AFD_HD AfdElement<F> afd_element(F v, F w, F old, F ref, const AfdConstants& k) {
  F a = k.s * old + w, d = F{}, gap = k.gap * (v - ref);
  if (OLD) d = k.step * (v - old);
  F grad = OLD ? k.difference * a + k.total * d : k.difference * a;
  return {a, d, gap, grad + k.reference * gap};
}

template <class F>
AFD_HD F afd_dense_gradient(const AfdElement<F>& x, F r, const AfdConstants& k, bool ref_by_r) {
  F pos = k.difference * r, neg = k.total * (1.0f - r), gap = k.reference * x.gap;
  return (pos - neg) * x.a + (pos + neg) * x.d + (ref_by_r ? r * gap : gap);
}

// Two parts of a slot into one: the slots from S_X0_MAX are maxima of squares. A maximum may miss a NaN; afd_highest does not.
AFD_HD double afd_join(int slot, double a, double b) { return slot < S_X0_MAX ? a + b : a > b ? a : b; }
AFD_HD double afd_highest(double sum, double most) { return sum != sum ? sum : most; }

struct AfdBatch { double per_sample, per_chosen; bool all; };  // what the masks of the whole batch say
struct AfdTerms { double policy, prior, signal, r; };

AFD_HD double afd_divisor(double x) { return x > 0 ? x : x != x ? x : 1; }

// Elements of sample b that count, or their weights' sum.
AFD_HD double afd_kept(const AfdCall& c, int64_t b, double kept) {
  return c.mask || c.weight ? kept : (double)(c.cu ? (c.cu[b + 1] - c.cu[b]) * c.count : c.count);
}

// kept: S_KEPT of sample b at kept[b]; null where it is not summed or not read.
AFD_HD AfdBatch afd_batch(const AfdCall& c, const double* kept) {
  double valid = 0, chosen = 0, valid_elements = 0, elements = 0;
  for (int64_t b = 0; b < c.samples; b++) {
    double m = c.valid ? c.valid[b] : 1.0, both = c.chosen ? m * c.chosen[b] : m, n = afd_kept(c, b, kept ? kept[b] : 0);
    valid += m; chosen += both; valid_elements += m * n; elements += both * n;
  }
  bool all = c.empty_all && !(chosen > 0);
  double base = c.ref_batch ? (all ? valid_elements : elements) : all ? valid : chosen;
  return {c.batch_mean ? 1 / afd_divisor(valid) : 1, c.batch_mean || c.ref_batch ? 1 / afd_divisor(base) : 1, all};
}

// exp(x) for x <= 0. libm's has a symbol version of glibc 2.29, which the wheel's systems may lack.
AFD_HD double afd_exp(double x) {
  if (!(x > -745)) return x != x ? x : 0;
  double k = rint(x * 1.4426950408889634);
  return ldexp(1 + expm1((x - k * 0.693147180369123816490) - k * 1.90821492927058770002e-10), (int)k);
}

// One sample's sums (slot k at sums[k * stride]) -> its rows and its terms of the loss.
// has_sums: whether the loss is known yet, or only the coefficients are wanted.
AFD_HD AfdTerms afd_sample(const AfdCall& c, const AfdBatch& batch, int64_t b, const double* sums, int64_t stride,
                           bool has_sums) {
  int64_t B = c.samples;
  double kept = afd_divisor(afd_kept(c, b, c.mask || c.weight ? sums[S_KEPT * stride] : 0)), size = c.sample_mean ? kept : 1;
  double r = c.each ? sums[S_R * stride] / kept : c.r[b], m = c.valid ? c.valid[b] : 1.0;
  double weight = m * batch.per_sample * (c.policy_weight ? c.policy_weight[b] : 1.0);
  double rho = (batch.all || !c.chosen ? m : m * c.chosen[b]) * batch.per_chosen * (c.ref_batch ? size : 1.0) *
               (c.prior_weight ? c.prior_weight[b] : 1.0) * (c.ref_by_r && !c.each ? r : 1.0);
  double w_pos = 1, w_neg = 1;
  if (c.adaptive) {
    double raw = sums[S_SIZE] / kept, other = raw - sums[S_SIZE_GAP * stride] / kept;
    w_pos = raw > c.floor ? raw : c.floor;
    w_neg = other > c.floor ? other : c.floor;
    if (raw != raw) w_pos = w_neg = raw;  // NaN is passed on
    if (c.shared) w_neg = w_pos;
  }
  double k = 2 * (double)c.beta * c.factor / size * weight, gap = w_pos - w_neg;
  double pos = sums[S_POS * stride] / size / w_pos, neg = sums[S_NEG * stride] / size / w_neg;  // read where has_sums or dpo
  double difference = k / (2 * w_pos * w_neg) * ((2 * r - 1) * (w_pos + w_neg) - gap);
  double total = k / (2 * w_pos * w_neg) * ((w_pos + w_neg) - (2 * r - 1) * gap);
  double policy = r * pos + (1 - r) * neg, q = sums[S_PRIOR * stride] / size, signal = (2 * r - 1) * (pos + neg) / 2;
  double loss_q = q;
  if (c.each) {
    double r_pos = sums[S_R_POS * stride] / size / w_pos, r_neg = sums[S_R_NEG * stride] / size / w_neg;
    difference = k / w_pos; total = k / w_neg;
    policy = r_pos + r_neg;
    signal = r_pos - pos / 2 + neg / 2 - r_neg;
    if (c.ref_by_r) loss_q = sums[S_R_PRIOR * stride] / size;
  } else if (c.dpo) {
    double y = c.dpo_beta * (2 * r - 1) / 2, z = y * (pos - neg);
    double small = afd_exp(-fabs(z)), slope = y * (z > 0 ? 1 : small) / (1 + small);
    difference = k * slope * (1 / w_pos + 1 / w_neg);
    total = k * slope * (1 / w_pos - 1 / w_neg);
    policy = (z > 0 ? z : 0) + log1p(small);
  }
  c.rows[R_DIFFERENCE * B + b] = (float)difference;
  c.rows[R_SUM * B + b] = (float)total;
  c.rows[R_REFERENCE * B + b] = (float)(2 * c.ref_coef / size * rho);
  if (!has_sums) return {0, 0, 0, 0};
  double row[R_DIFFERENCE] = {pos, neg, w_pos, w_neg, q, sums[S_DRIFT * stride] / kept, afd_sqrt64(sums[S_V * stride]),
                              afd_sqrt64(sums[S_REF * stride]),  // the statistics, in the order of AfdRow
                              afd_highest(sums[S_DRIFT * stride], sums[S_DRIFT_MAX * stride]), sums[S_OLD_REF * stride] / kept,
                              sums[S_X0 * stride] / kept, afd_highest(sums[S_X0 * stride], sums[S_X0_MAX * stride])};
  for (int i = 0; i < R_DIFFERENCE; i++) c.rows[i * B + b] = (float)row[i];
  return {weight * c.factor * policy, rho * loss_q, signal, r};
}

AFD_HD void afd_total(const AfdCall& c, AfdTerms sum) {
  *c.loss = (float)(sum.policy + c.ref_coef * sum.prior);
  c.totals[T_POLICY] = (float)sum.policy;
  c.totals[T_PRIOR] = (float)sum.prior;
  c.totals[T_SIGNAL] = (float)(c.samples ? sum.signal / c.samples : 0);
  c.totals[T_R_MEAN] = (float)(c.samples ? sum.r / c.samples : 0);
}

AFD_HD void afd_finish(const AfdCall& c, bool has_sums) {
  AfdBatch batch = afd_batch(c, c.sums + S_KEPT * c.samples);
  AfdTerms sum = {0, 0, 0, 0};
  for (int64_t b = 0; b < c.samples; b++) {
    AfdTerms x = afd_sample(c, batch, b, c.sums + b, c.samples, has_sums);
    sum.policy += x.policy; sum.prior += x.prior; sum.signal += x.signal; sum.r += x.r;
  }
  if (has_sums) afd_total(c, sum);
}
