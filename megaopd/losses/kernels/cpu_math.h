/* Vectors of fp32, their exponentials, and the kinds of divergences.py on them; see cpu_shard.c. */

#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__AVX512F__)
#define LANES 16
#define vmax(a, b) ((vec)_mm512_max_ps((__m512)(a), (__m512)(b)))
#define vmin(a, b) ((vec)_mm512_min_ps((__m512)(a), (__m512)(b)))
#elif defined(__AVX2__)
#define LANES 8
#define vmax(a, b) ((vec)_mm256_max_ps((__m256)(a), (__m256)(b)))
#define vmin(a, b) ((vec)_mm256_min_ps((__m256)(a), (__m256)(b)))
#else
#define LANES 4
#define vmax(a, b) pick((a) > (b), a, b)
#define vmin(a, b) pick((a) < (b), a, b)
#endif
#define OUT -1e38f

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

/* ---- vectors ---- */

INLINE vec all(float x) { return x - (vec){0}; }
INLINE vec pick(ints mask, vec a, vec b) { return (vec)((mask & (ints)a) | (~mask & (ints)b)); }
INLINE vec load(const float *x) {
    vec v;
    memcpy(&v, x, sizeof v);
    return vmax(all(OUT), v);
}
INLINE vec load_raw(const float *x) {
    vec v;
    memcpy(&v, x, sizeof v);
    return v;
}
INLINE void store(float *x, vec v) { memcpy(x, &v, sizeof v); }
/* Rows come from memory one after the other: this is what 8 KB further on has time to. */
INLINE void fetch_ahead(const float *x) { __builtin_prefetch(x + 2048, 0, 2); }
/* Numbers below 1e-38 count as 0 until restore(): they would take a hundred cycles each. */
INLINE uint32_t flush_tiny(void) {
#if defined(__SSE2__)
    uint32_t mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
    return mode;
#else
    return 0;
#endif
}
INLINE void restore(uint32_t mode) {
#if defined(__SSE2__)
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}
INLINE void add_lanes(double *lanes, vec a) {
    for (int i = 0; i < LANES; i++) lanes[i] += a[i];
}
INLINE double total(const double *lanes) {
    double sum = 0;
    for (int i = 0; i < LANES; i++) sum += lanes[i];
    return sum;
}
INLINE vec magnitude(vec a) { return (vec)((ints)a & 0x7fffffff); }

/* ---- e^x, e^x - 1, log(1 + x) ---- */

#define LOG2E 1.44269504f
#define LN2_HI 0.693359375f /* few bits: n LN2_HI is exact, also without fused operations */
#define LN2_LO -2.12194440e-4f
#define MAGIC 12583039.0f /* 1.5 * 2^23 + 127: adding it leaves n + 127 in the lowest bits */

/* e^x / Z. log Z is k ln 2 + rest: the power of 2 goes into the exponent's bias, and the rest is
subtracted when x has been reduced to some |r| < 1, so that rounding errors are those of r. */
typedef struct {
    vec rest, magic, low, high;
} Shift;

INLINE Shift shift_of(double log_z) {
    double k = 0, ln2 = 0.6931471805599453;
    if (log_z > -1e6 && log_z < 1e6) k = (double)(int64_t)(log_z / ln2 + (log_z < 0 ? -0.5 : 0.5));
    return (Shift){all(log_z - k * ln2), all(MAGIC - (float)k), all((k - 127) * ln2),
                   all((k + 128) * ln2)};
}

/* r (1 + r P(r)) = e^r - 1 for |r| <= log(2) / 2 */
INLINE vec expm1_poly(vec r) {
    vec y = r * 1.38145402e-3f + 8.36874498e-3f;
    y = y * r + 4.16683890e-2f;
    y = y * r + 1.66665196e-1f;
    y = y * r + 4.99999940e-1f;
    return y * r * r + r;
}
INLINE vec exp_shift(vec x, const Shift *h) {
    vec turns = vmin(h->high, vmax(h->low, x - h->rest)) * LOG2E + h->magic;
    vec n = turns - h->magic;
    vec r = vmax(all(-1), (x - n * LN2_HI - h->rest) - n * LN2_LO);
    vec scale = (vec)((bits)turns << 23);
    return expm1_poly(r) * scale + scale;
}
/* x <= 0; exact to the last bits near 0 */
INLINE vec expm1_negative(vec x) {
    x = vmax(all(-88.1f), x);
    vec turns = x * LOG2E + MAGIC;
    vec n = turns - MAGIC;
    vec r = (x - n * LN2_HI) - n * LN2_LO;
    vec scale = (vec)((bits)turns << 23);
    return expm1_poly(r) * scale + (scale - 1.0f);
}
/* -1 < f <= 0 */
INLINE vec log1p_negative(vec f) {
    vec h = f + 1.0f;
    ints e = ((ints)h - 0x3f3504f3) >> 23;
    vec g = (vec)((ints)h - (e << 23)) - 1.0f + (f - (h - 1.0f));
    vec n = __builtin_convertvector(e, vec);
    vec y = g * 7.0376836292e-2f - 1.1514610310e-1f;
    y = y * g + 1.1676998740e-1f;
    y = y * g - 1.2420140846e-1f;
    y = y * g + 1.4249322787e-1f;
    y = y * g - 1.6668057665e-1f;
    y = y * g + 2.0000714765e-1f;
    y = y * g - 2.4999993993e-1f;
    y = y * g + 3.3333331174e-1f;
    vec gg = g * g;
    return n * 0.693147182f + (y * g * gg - gg * 0.5f + g);
}

/* ---- kinds ---- */

enum Kind { RKL, FKL, JSD, SKEW_FKL, SKEW_RKL, TV, HELLINGER, JEFFREYS, CHI2, SOFTENED_RKL, ALPHA };
typedef struct {
    vec p, q, d, square; /* d = log p - log q; square = q^2 / p, cut at e^60 */
} Point;
typedef struct {
    vec term, g; /* p f(r), G */
} Pair;
typedef struct {
    vec p, q, w, h; /* log p/M, log q/M; w = e^-|d| - 1, h = M / max(p, q) */
    ints neg;       /* p < q */
} Mixture;

INLINE Mixture mixture(vec d, float q_weight) {
    Mixture m;
    m.neg = d < 0.0f;
    m.w = expm1_negative(-magnitude(d));
    vec f = pick(m.neg, all(1 - q_weight), all(q_weight)) * m.w;
    vec l = log1p_negative(f);
    m.h = f + 1.0f;
    m.p = vmin(all(0), d) - l;
    m.q = -vmax(all(0), d) - l;
    return m;
}

INLINE Pair pair(const int kind, Point z, float a) {
    vec p = z.p, q = z.q, d = z.d, zero = all(0);
    if (kind == RKL) return (Pair){p * d, p * d + p};
    if (kind == FKL) return (Pair){-(q * d), -q};
    if (kind == JEFFREYS) return (Pair){(p - q) * d, p * d + (p - q)};
    if (kind == TV) {
        vec diff = p - q, sign = __builtin_convertvector((diff < zero) - (diff > zero), vec);
        return (Pair){0.5f * magnitude(diff), 0.5f * p * (sign + 0.0f * diff)};
    }
    if (kind == CHI2) return (Pair){z.square - 2.0f * q + p, p - z.square};
    if (kind == HELLINGER || kind == ALPHA) { /* mixed = p^(1-a) q^a */
        ints neg = d < 0.0f;
        a = kind == HELLINGER ? 0.5f : a;
        vec w = expm1_negative(-magnitude(d) * pick(neg, all(1 - a), all(a)));
        vec mixed = pick(neg, q, p) * (w + 1.0f);
        if (kind == ALPHA) {
            vec term = (mixed - (1 - a) * p - a * q) * (1 / (a * (a - 1)));
            return (Pair){term, (p - mixed) * (1 / a)};
        }
        vec diff = pick(neg, mixed, -p) * w; /* p - mixed */
        return (Pair){diff, diff + 0.5f * mixed};
    }
    Mixture m = mixture(d, kind == SKEW_RKL ? 1 - a : kind == SOFTENED_RKL ? 0.5f : a);
    if (kind == JSD) {
        vec g = (1 - a) * p * m.p;
        return (Pair){a * q * m.q + g, g};
    }
    if (kind == SKEW_FKL) return (Pair){q * m.q, (a - 1) * (vmin(p, q) / m.h)};
    if (kind == SKEW_RKL) {
        vec ratio = pick(m.neg, m.w + 1.0f, all(1)) / m.h; /* p / M */
        return (Pair){p * m.p, p * m.p + p * (1.0f - a * ratio)};
    }
    return (Pair){-(p + q) * m.q, p - p * m.q}; /* SOFTENED_RKL: log(M/q) = -m.q */
}
