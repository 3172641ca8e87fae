/* Fused fp32 passes over the rows of a vocabulary shard on a CPU; cpu.py compiles and calls them.

Rows of s and t are `width` floats, `s_stride` and `t_stride` apart. The formulas are those of
blocks.py (moments, gradient) and divergences.py (kinds), with x = log p, y = log q:

    moments_rows     offsets and the eight sums; s and t are only read
    divergence_rows  per part sum of p f(r); last, sum over parts of coef * sum G
    gradient_rows    s := p (p_coef + pd (s - t) + px x) + q_coef q + sum_i coef_i G_i
    complete_rows    one divergence, one shard: moments, value, s := d value / d s

Each works on rows [first, last) of a Job, so that threads can share one. A row is walked in
segments of whole vectors; what is left of it is padded with OUT in a buffer and makes a segment of
its own. Sums are kept per lane in fp32 for a run of 32 vectors, and added up in double.

Numbers. Logits below OUT count as OUT (-inf would make NaN of -inf - -inf): e^OUT = 0, and all that
multiplies such a 0 is finite. NaN stays NaN: maxima and minima return their second operand where
one is NaN. Kinds are written in d = x - y = (s - t) - c, not in two logarithms that cancel.
Results below e^-87.7 are 0. */

#include <math.h>

#include "cpu_rows.h"

/* ---- moments ---- */

enum Moment { Z_S = 1, Z_T = 2, D_S = 4, D_T = 8, A_S = 16, A_T = 32, Q_S = 64, R_S = 128 };
enum { STUDENT = Z_S | A_S | Q_S, MASSES = Z_S | Z_T, ALL = 255 };
enum { FOR_RKL = MASSES | D_S, FOR_FKL = MASSES | D_T };
enum { STORE_S = 256, STORE_T = 512, STORE = 768 }; /* keep e^(s - m_s), e^(t - m_t), both */
#define LIMIT 1e15 /* of a sum of e^x without offset */
#define LOG_LIMIT 34.0f

INLINE void moments_segment(const int want, const Segment *g, const Shift *shift,
                            float *restrict e_s, float *restrict e_t, double *sums) {
    const float *s_at = g->s, *t_at = g->t;
    const Shift to_s = shift[0], to_t = shift[1];
    double lanes[8][LANES] = {{0}};
    for (int64_t from = 0; from < g->n; from += RUN) {
        const int64_t to = run_end(g, from);
        vec acc[8] = {0};
        for (int64_t i = from; i < to; i += LANES) {
            fetch_ahead(s_at + i);
            if (want & Z_T) fetch_ahead(t_at + i);
            vec s = load(s_at + i), e = exp_shift(s, &to_s);
            acc[0] += e;
            if (want & STORE_S) store(e_s + g->at + i, e);
            if (want & A_S) acc[4] += e * s;
            if (want & Q_S) acc[6] += e * e;
            if (!(want & Z_T)) continue;
            vec t = load(t_at + i), d = s - t, f = exp_shift(t, &to_t);
            acc[1] += f;
            if (want & STORE_T) store(e_t + g->at + i, f);
            if (want & D_S) acc[2] += e * d;
            if (want & D_T) acc[3] -= f * d;
            if (want & A_T) acc[5] += f * t;
            if (want & R_S) acc[7] += e * e * d;
        }
        for (int i = 0; i < 8; i++)
            if (want >> i & 1) add_lanes(lanes[i], acc[i]);
    }
    for (int i = 0; i < 8; i++)
        if (want >> i & 1) sums[i] += total(lanes[i]);
}

static float row_maximum(const float *x, int64_t width) {
    float best = OUT;
    vec m = all(OUT);
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        fetch_ahead(x + i);
        m = vmax(m, load(x + i));
    }
    for (; i < width; i++) best = x[i] > best ? x[i] : best;
    for (int l = 0; l < LANES; l++) best = m[l] > best ? m[l] : best;
    return best;
}

/* Sums of a row relative to job->offsets: 0, or the maximum where with 0 a sum is out of range. It
is begun anew as soon as that shows. */
INLINE void moments_row(const int want, const Job *job, int64_t row, float *e_s, float *e_t,
                        double *sums) {
    const float *x[2] = {job->s + row * job->s_stride, job->t ? job->t + row * job->t_stride : 0};
    const int laws = want & Z_T ? 2 : 1;
    int raised[2] = {0, 0}, done = 0;
    while (!done) {
        Shift to[2];
        for (int l = 0; l < laws; l++) {
            float m = raised[l] ? row_maximum(x[l], job->width) : 0;
            job->offsets[l * job->rows + row] = m;
            to[l] = shift_of(m);
        }
        if (laws == 1) to[1] = to[0];
        memset(sums, 0, 8 * sizeof *sums);
        done = 1;
        SEGMENTS(g, job, row, 0) {
            moments_segment(want, &g, to, e_s, e_t, sums);
            for (int l = 0; l < laws; l++)
                if (!raised[l] && !(sums[l] > 1 / LIMIT && sums[l] < LIMIT))
                    raised[l] = 1, done = 0;
            if (!done) break;
        }
    }
    for (int i = 0; i < 8; i++)
        if (want >> i & 1) job->sums[i * job->rows + row] = sums[i];
}

/* `want` as one of the sets of sums that are compiled. */
static int compiled_set(int64_t names, int teacher) {
    const int want = names | Z_S | (teacher ? Z_T : 0);
    if (!teacher) return STUDENT;
    return want == MASSES || want == FOR_RKL || want == FOR_FKL ? want : ALL;
}
static void moments_of(int want, const Job *job, int64_t row, float *e_s, float *e_t,
                       double *sums) {
#define CASE(set)                                     \
    case set:                                         \
        moments_row(set, job, row, e_s, e_t, sums);   \
        break;
    switch (want) {
        CASE(STUDENT) CASE(MASSES) CASE(FOR_RKL) CASE(FOR_FKL) CASE(ALL)
        CASE(MASSES | STORE) CASE(FOR_RKL | STORE_S) CASE(FOR_FKL | STORE) CASE(ALL | STORE)
    }
#undef CASE
}
void moments_rows(const Job *job, int64_t first, int64_t last, float *scratch) {
    const int want = compiled_set(job->names, job->t != 0);
    const uint32_t mode = flush_tiny();
    double sums[8];
    (void)scratch;
    for (int64_t row = first; row < last; row++) moments_of(want, job, row, 0, 0, sums);
    restore(mode);
}

/* ---- divergences and gradients from complete norms ---- */

#define EACH_KIND(DO)                                                                    \
    DO(RKL) DO(FKL) DO(JSD) DO(SKEW_FKL) DO(SKEW_RKL) DO(TV) DO(HELLINGER) DO(JEFFREYS)  \
    DO(CHI2) DO(SOFTENED_RKL) DO(ALPHA)

/* sums[0] += p f(r), sums[1] += G */
INLINE void divergence_segment(const int kind, const Segment *g, const Laws *laws, float a,
                               double *sums) {
    const float *s_at = g->s, *t_at = g->t;
    const Laws w = *laws;
    double terms[LANES] = {0}, slopes[LANES] = {0};
    for (int64_t from = 0; from < g->n; from += RUN) {
        const int64_t to = run_end(g, from);
        vec term = all(0), slope = all(0);
        for (int64_t i = from; i < to; i += LANES) {
            fetch_ahead(s_at + i);
            fetch_ahead(t_at + i);
            Pair found = pair(kind, point(&w, load(s_at + i), load(t_at + i)), a);
            term += found.term;
            slope += found.g;
        }
        add_lanes(terms, term);
        add_lanes(slopes, slope);
    }
    sums[0] += total(terms);
    sums[1] += total(slopes);
}
void divergence_rows(const Job *job, int64_t first, int64_t last, float *scratch) {
    const uint32_t mode = flush_tiny();
    (void)scratch;
    for (int64_t row = first; row < last; row++) {
        Laws w = laws_at(job, row);
        double slope = 0;
        for (int64_t i = 0; i < job->parts; i++) {
            double sums[2] = {0, 0};
            float a = job->parameters[i];
            switch (job->kinds[i]) {
#define CASE(kind)                                                              \
    case kind:                                                                  \
        SEGMENTS(g, job, row, 0) divergence_segment(kind, &g, &w, a, sums);     \
        break;
                EACH_KIND(CASE)
#undef CASE
            }
            job->sums[i * job->rows + row] = sums[0];
            slope += job->coefs[i * job->rows + row] * sums[1];
        }
        job->sums[job->parts * job->rows + row] = slope;
    }
    restore(mode);
}

/* added [width] += coef G */
INLINE void add_segment(const int kind, const Segment *g, const Laws *laws, float a, float coef,
                        float *restrict added) {
    const Laws w = *laws;
    for (int64_t i = 0; i < g->n; i += LANES) {
        float *at = added + g->at + i;
        Point z = point(&w, load(g->s + i), load(g->t + i));
        store(at, load_raw(at) + coef * pair(kind, z, a).g);
    }
}
enum { NONE = -1, WITH_X = 1, WITH_T = 2, WITH_Q = 4, ADDED = 8, FULL = 7 }; /* terms */
typedef struct {
    float p, pd, px, q, part;
} Weights;
static float at(const float *coef, int64_t row) { return coef ? coef[row] : 0; }

INLINE void gradient_segment(const int kind, const int terms, const Segment *g, const Laws *laws,
                             Weights by, float a, const float *restrict added) {
    const Laws w = *laws;
    float *s_at = g->s;
    const float *t_at = g->t;
    for (int64_t i = 0; i < g->n; i += LANES) {
        fetch_ahead(s_at + i);
        if (terms & WITH_T) fetch_ahead(t_at + i);
        vec s = load(s_at + i), p = exp_shift(s, &w.s), dz = p * by.p;
        if (terms & WITH_X) dz += p * ((s - w.m_s) - w.log_z_s) * by.px;
        if (terms & WITH_T) {
            vec t = load(t_at + i);
            dz += p * (s - t) * by.pd;
            if (terms & WITH_Q) {
                Point z = point(&w, s, t);
                dz += z.q * by.q;
                if (kind != NONE) dz += by.part * pair(kind, z, a).g;
            }
        }
        if (terms & ADDED) dz += load_raw(added + g->at + i);
        store(s_at + i, dz);
    }
}

static void add_parts(const Job *job, int64_t row, const Laws *w, float *added) {
    memset(added, 0, (job->width + LANES) * sizeof *added);
    for (int64_t i = 0; i < job->parts; i++) {
        float a = job->parameters[i], coef = job->coefs[i * job->rows + row];
        switch (job->kinds[i]) {
#define CASE(kind)                                                              \
    case kind:                                                                  \
        SEGMENTS(g, job, row, 0) add_segment(kind, &g, w, a, coef, added);      \
        break;
            EACH_KIND(CASE)
#undef CASE
        }
    }
}

void gradient_rows(const Job *job, int64_t first, int64_t last, float *scratch) {
    const int kind = job->parts == 1 ? job->kinds[0] : NONE;
    const float a = job->parts == 1 ? job->parameters[0] : 0;
    const uint32_t mode = flush_tiny();
    for (int64_t row = first; row < last; row++) {
        Laws w = laws_at(job, row);
        Weights by = {at(job->p, row), at(job->pd, row), at(job->px, row), at(job->q, row),
                      kind == NONE ? 0 : job->coefs[row]};
        if (job->parts > 1) add_parts(job, row, &w, scratch);
#define ROW(kind, terms) \
    SEGMENTS(g, job, row, 1) gradient_segment(kind, terms, &g, &w, by, a, scratch)
        switch (kind) {
#define CASE(kind)            \
    case kind:                \
        ROW(kind, FULL);      \
        break;
            EACH_KIND(CASE)
#undef CASE
        default:
            if (job->parts > 1) ROW(NONE, FULL | ADDED);
            else if (job->q) ROW(NONE, FULL);
            else if (job->pd) ROW(NONE, WITH_X | WITH_T);
            else if (job->px) ROW(NONE, WITH_X);
            else ROW(NONE, 0);
        }
#undef ROW
    }
    restore(mode);
}

/* ---- all of one divergence, where no other shard exists ---- */

/* s := G, and sums of p f(r) and G; e_s, e_t hold Z p and Z q */
INLINE void value_segment(const int kind, const Segment *g, const Laws *laws, double z_s,
                          double z_t, float a, const float *restrict e_s,
                          const float *restrict e_t, double *sums) {
    const Laws w = *laws;
    const float p_hi = 1 / z_s, q_hi = 1 / z_t; /* with the digits that these lack, */
    const float p_lo = 1 / z_s - p_hi, q_lo = 1 / z_t - q_hi; /* p and q sum to 1 */
    float *s_at = g->s;
    const float *t_at = g->t;
    double terms[LANES] = {0}, slopes[LANES] = {0};
    for (int64_t from = 0; from < g->n; from += RUN) {
        const int64_t to = run_end(g, from);
        vec term = all(0), slope = all(0);
        for (int64_t i = from; i < to; i += LANES) {
            vec s = load(s_at + i), t = load(t_at + i);
            vec u = load_raw(e_s + g->at + i), v = load_raw(e_t + g->at + i);
            Point z = {u * p_hi + u * p_lo, v * q_hi + v * q_lo, (s - t) - w.c,
                       square_of(&w, s, t)};
            Pair found = pair(kind, z, a);
            term += found.term;
            slope += found.g;
            store(s_at + i, found.g);
        }
        add_lanes(terms, term);
        add_lanes(slopes, slope);
    }
    sums[0] += total(terms);
    sums[1] += total(slopes);
}

/* s := true gradient: rkl p (d - E_p d), fkl p - q, else G - p sum G with G in s. */
INLINE void finish_segment(const int kind, const Segment *g, float p_scale, float q_scale,
                           float mean, const float *restrict e_s, const float *restrict e_t) {
    float *s_at = g->s;
    const float *t_at = g->t;
    for (int64_t i = 0; i < g->n; i += LANES) {
        vec s = load(s_at + i), p = load_raw(e_s + g->at + i) * p_scale;
        if (kind == RKL) s = p * ((s - load(t_at + i)) - mean);
        else if (kind == FKL) s = p - load_raw(e_t + g->at + i) * q_scale;
        else s -= p * mean;
        store(s_at + i, s);
    }
}

INLINE void complete_row(const int kind, int want, const Job *job, int64_t row,
                         float *restrict e_s, float *restrict e_t) {
    double m[8], value[2] = {0, 0}; /* value, sum of G */
    moments_of(want, job, row, e_s, e_t, m);
    double log_z_s = log(m[0]), log_z_t = log(m[1]), mean;
    double m_s = job->offsets[row], m_t = job->offsets[job->rows + row];
    double c = (m_s - m_t) + (log_z_s - log_z_t);
    if (kind == RKL) {
        mean = m[2] / m[0];
        value[0] = mean - c;
    } else if (kind == FKL) {
        mean = 0;
        value[0] = m[3] / m[1] + c;
    } else {
        Laws w = laws_of(m_s, log_z_s, m_t, log_z_t);
        SEGMENTS(g, job, row, 1)
        value_segment(kind, &g, &w, m[0], m[1], job->parameters[0], e_s, e_t, value);
        mean = value[1];
    }
    SEGMENTS(g, job, row, 1) finish_segment(kind, &g, 1 / m[0], 1 / m[1], mean, e_s, e_t);
    job->value[row] = value[0];
}

/* scratch: two rows of width + LANES floats */
void complete_rows(const Job *job, int64_t first, int64_t last, float *scratch) {
    const int kind = job->kinds[0], needed = kind == RKL ? D_S : kind == FKL ? D_T : 0;
    const int set = compiled_set(job->names | needed, 1);
    const int want = set | (set == FOR_RKL ? STORE_S : STORE);
    const uint32_t mode = flush_tiny();
    float *e_s = scratch, *e_t = scratch + job->width + LANES;
    for (int64_t row = first; row < last; row++) switch (kind) {
#define CASE(kind)                                        \
    case kind:                                            \
        complete_row(kind, want, job, row, e_s, e_t);     \
        break;
            EACH_KIND(CASE)
#undef CASE
        }
    restore(mode);
}
