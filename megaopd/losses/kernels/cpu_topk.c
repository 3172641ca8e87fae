/* The k largest of each row, descending, ties to the lower column.

Columns are divided into `classes` by their remainder. The k-th largest of the classes' maxima is a
lower bound of the k-th largest of the row (k classes reach it), and a close one: with 2 k classes
some 1.4 k elements of a row in random order lie above. So: one pass for the maxima, one, in cache,
that collects what is not below the bound, and a stable sort of that. -0.0 counts as 0.0, NaN as the
largest value. In the worst case (all equal) everything is collected and sorted, in linear time. */

#include "cpu_math.h"

typedef struct {
    const float *x;
    int64_t rows, width, stride, k;
    float *values;    /* [rows, k] */
    int64_t *columns; /* [rows, k] */
} TopJob;

#define BLOCK (4 * LANES)
#define SHORT 32 /* items that are sorted by insertion */
#define NO_VALUE -3.0e38f
#define NO_COLUMN 0x7fffffff

/* Value and column as one integer; smaller is better. */
typedef uint64_t Item;

static Item item_of(float x, int64_t column) {
    int32_t b;
    memcpy(&b, &x, sizeof b);
    if (x != x) b = 0x7fc00000;
    if (x == 0) b = 0;
    uint32_t ordered = (uint32_t)(b ^ ((b >> 31) & 0x7fffffff)) ^ 0x7fffffffu;
    return (Item)ordered << 32 | (uint32_t)column;
}
static float value_of(Item item) {
    int32_t b = (uint32_t)(item >> 32) ^ 0x7fffffffu;
    b ^= (b >> 31) & 0x7fffffff;
    float x;
    memcpy(&x, &b, sizeof x);
    return x;
}

/* Sorts by value, best first, and keeps the order of equal values; the result is x or spare. */
static Item *sorted(Item *x, Item *spare, int64_t n) {
    if (n <= SHORT) {
        for (int64_t i = 1; i < n; i++) {
            Item item = x[i];
            int64_t j = i;
            for (; j > 0 && x[j - 1] > item; j--) x[j] = x[j - 1];
            x[j] = item;
        }
        return x;
    }
    uint32_t count[4][256] = {{0}};
    for (int64_t i = 0; i < n; i++)
        for (int digit = 0; digit < 4; digit++) count[digit][x[i] >> (32 + 8 * digit) & 255]++;
    for (int digit = 0; digit < 4; digit++) {
        uint32_t *start = count[digit], next = 0;
        const int shift = 32 + 8 * digit;
        if (start[x[0] >> shift & 255] == n) continue;
        for (int i = 0; i < 256; i++) {
            uint32_t here = start[i];
            start[i] = next;
            next += here;
        }
        for (int64_t i = 0; i < n; i++) spare[start[x[i] >> shift & 255]++] = x[i];
        Item *old = x;
        x = spare;
        spare = old;
    }
    return x;
}

/* The k-th best value, 1 <= k <= n; x is used up. */
static float kth_value(Item *x, int64_t n, int64_t k) {
    for (int shift = 56; shift >= 32; shift -= 8) {
        int64_t count[256] = {0}, kept = 0;
        for (int64_t i = 0; i < n; i++) count[x[i] >> shift & 255]++;
        Item digit = 0;
        while (count[digit] < k) k -= count[digit++];
        for (int64_t i = 0; i < n; i++) {
            x[kept] = x[i];
            kept += (x[i] >> shift & 255) == digit;
        }
        n = kept;
    }
    return value_of(x[0]);
}

/* Lanes that are not below `bound`, as bits. */
INLINE uint32_t not_below(const float *x, float bound) {
    vec v = load_raw(x);
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(bound), _CMP_NLT_UQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(bound), _CMP_NLT_UQ));
#else
    ints below = v < bound;
    uint32_t found = 0;
    for (int i = 0; i < LANES; i++) found |= (uint32_t)(~below[i] & 1) << i;
    return found;
#endif
}

/* A value that at least k of the row reach; -inf where the row is too short to find a useful one.
maxima: room for width / 2. */
static float lower_bound(const float *x, int64_t width, int64_t k, float *maxima,
                         Item *items) {
    int64_t classes = BLOCK;
    while (classes < 2 * k) classes *= 2;
    if (2 * classes > width) return -__builtin_inff();
    for (int64_t j = 0; j < classes; j++) maxima[j] = -__builtin_inff();
    for (int64_t at = 0; at + classes <= width; at += classes)
        for (int64_t j = 0; j < classes; j += LANES) {
            fetch_ahead(x + at + j);
            store(maxima + j, vmax(load_raw(x + at + j), load_raw(maxima + j))); /* skips NaN */
        }
    for (int64_t j = 0; j < classes; j++) items[j] = item_of(maxima[j], 0);
    return kth_value(items, classes, k);
}

/* Columns that are not below the bound, in order; how many. */
static int64_t collect(const float *x, int64_t width, float bound, Item *items) {
    int64_t at = 0, n = 0;
    for (; at + BLOCK <= width; at += BLOCK) {
        uint32_t found[4], any = 0;
        for (int v = 0; v < 4; v++) any |= found[v] = not_below(x + at + v * LANES, bound);
        if (!any) continue;
        for (int v = 0; v < 4; v++)
            for (uint32_t left = found[v]; left; left &= left - 1) {
                int64_t column = at + v * LANES + __builtin_ctz(left);
                items[n++] = item_of(x[column], column);
            }
    }
    for (; at < width; at++)
        if (!(x[at] < bound)) items[n++] = item_of(x[at], at);
    return n;
}

/* scratch: 5 floats a column */
void topk_rows(const TopJob *job, int64_t first, int64_t last, float *scratch) {
    const int64_t k = job->k, width = job->width;
    Item *items = (Item *)scratch, *spare = items + width;
    float *maxima = (float *)(spare + width);
    for (int64_t row = first; row < last; row++) {
        const float *x = job->x + row * job->stride;
        float bound = lower_bound(x, width, k, maxima, items);
        int64_t n = collect(x, width, bound, items);
        const Item *best = sorted(items, spare, n);
        for (int64_t i = 0; i < k; i++) {
            int64_t column = i < n ? (int64_t)(uint32_t)best[i] : NO_COLUMN;
            job->columns[row * k + i] = column;
            job->values[row * k + i] = i < n ? x[column] : NO_VALUE;
        }
    }
}
