/* What cpu_shard.c works on: a Job's rows, in segments, and the laws of a row. */

#include "cpu_math.h"

#define SEGMENT 4096
#define RUN (32 * LANES) /* floats between additions to doubles: a large one swallows small ones */

typedef struct {
    float *s;
    const float *t;
    int64_t rows, width, s_stride, t_stride;
    const float *m_s, *log_z_s, *m_t, *log_z_t; /* log p = (s - m_s) - log_z_s */
    const float *p, *pd, *px, *q;               /* coefficients [rows]; NULL: absent */
    float *offsets, *sums, *value;              /* [2, rows], [.., rows], [rows] */
    const int32_t *kinds;                       /* [parts] */
    const float *parameters, *coefs;            /* [parts], [parts, rows] */
    int64_t parts, names;                       /* names: bit set of Moment */
} Job;

/* ---- segments ---- */

typedef struct {
    float *s;
    const float *t;
    int64_t at, n, left; /* n: a multiple of LANES; left: floats of the row from here on */
    float *s_row;
    const float *t_row;
    float s_pad[LANES], t_pad[LANES];
} Segment;

INLINE int segment_at(Segment *g, int64_t at, int64_t width) {
    g->at = at;
    g->left = width - at;
    g->s = g->s_row + at;
    g->t = g->t_row ? g->t_row + at : g->s;
    g->n = g->left < SEGMENT ? g->left - g->left % LANES : SEGMENT;
    if (g->n > 0 || g->left <= 0) return g->left > 0;
    for (int i = 0; i < LANES; i++) {
        g->s_pad[i] = i < g->left ? g->s[i] : OUT;
        g->t_pad[i] = i < g->left ? g->t[i] : OUT;
    }
    g->s = g->s_pad;
    g->t = g->t_pad;
    g->n = LANES;
    return 1;
}
/* To the next one; what was written to a padded segment goes back to the row. */
INLINE void segment_done(Segment *g, int written) {
    if (written && g->s == g->s_pad)
        memcpy(g->s_row + g->at, g->s_pad, g->left * sizeof(float));
    g->at += g->n;
}
/* for each segment g of a row; written: s was */
#define SEGMENTS(g, job, row, written)                                             \
    for (Segment g = {.s_row = (job)->s + (row) * (job)->s_stride,                 \
                      .t_row = (job)->t ? (job)->t + (row) * (job)->t_stride : 0}; \
         segment_at(&g, g.at, (job)->width); segment_done(&g, written))
INLINE int64_t run_end(const Segment *g, int64_t from) {
    return from + RUN < g->n ? from + RUN : g->n;
}

/* ---- laws ---- */

typedef struct {
    Shift s, t, square;       /* of p, q and q^2 / p */
    vec c, cut, m_s, log_z_s; /* c = log Z_s - log Z_t; cut: where q^2 / p = e^60 */
} Laws;

static Laws laws_of(double m_s, double log_z_s, double m_t, double log_z_t) {
    double c = (m_s - m_t) + (log_z_s - log_z_t), log_z = (m_t + log_z_t) - c;
    return (Laws){shift_of(m_s + log_z_s), shift_of(m_t + log_z_t), shift_of(log_z), all(c),
                  all(60 + log_z), all(m_s), all(log_z_s)};
}
static Laws laws_at(const Job *job, int64_t row) {
    int t = job->m_t != 0;
    return laws_of(job->m_s[row], job->log_z_s[row], t ? job->m_t[row] : 0,
                   t ? job->log_z_t[row] : 0);
}

INLINE vec square_of(const Laws *w, vec s, vec t) {
    return exp_shift(vmin(w->cut, 2.0f * t - s), &w->square);
}
INLINE Point point(const Laws *w, vec s, vec t) {
    return (Point){exp_shift(s, &w->s), exp_shift(t, &w->t), (s - t) - w->c, square_of(w, s, t)};
}
