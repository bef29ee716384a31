/* The row losses of torch_backend.py in fused loops: a row is read once for its loss, and once more,
   from the cache where it fits, for its gradient, which may overwrite the row.

   Compiled at first use (build.py) without -ffast-math: -inf and NaN mean what they do in
   reference.py. Only loops marked `omp simd reduction` sum in another order than written, the same
   one every time. A row is the work of one thread, so the number of threads changes no sum. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define BLOCK 1024 /* entries whose maximum is taken before their exponentials are summed */
#define LANES 16   /* entries side by side whose maxima are kept apart when the largest are sought */
#define SEGMENTS 256 /* entries that leave LANES maxima */

#define WORTH_THREADS 131072 /* entries: fewer take no longer than threads need to wake */

enum { FLOAT32, BFLOAT16, FLOAT16, TYPES };
enum { CROSS_ENTROPY, KL, TOPK, LOCAL_ENTROPY, INDICES };
enum { FLATTEN_GLOBAL, FLATTEN_LOCAL, FLATTEN_NUMBER, ENTROPY };

typedef struct {
    const void *logits, *ref_logits, *indices, *labels;
    void *grad;              /* NULL: none is made */
    const float *weights;    /* of the rows in the gradient; NULL: 1 each */
    float *losses;           /* NULL: backward, which reads `state` */
    float *state;            /* [rows, 4]; NULL: nobody wants it */
    int32_t *chosen;         /* [rows, k]: where the chosen indices go */
    float *values;           /* [rows, k]: entries of S, from forward to backward; may be NULL */
    int32_t *bad;            /* [rows]: whether its indices are out of range or not unique */
    int64_t rows, columns, k;
    int64_t stride, ref_stride, grad_stride; /* between rows, in entries */
    int64_t ignore_index;
    int32_t type, wide_indices, objective, forward_kl, select_by_current;
    float softcap, ref_softcap, center; /* a softcap of 0: none */
} Args;

typedef union { float f; uint32_t u; int32_t i; } Bits;

/* ---- entries ---- */

INLINE float from_half(uint16_t half) {
    Bits b = {.u = (uint32_t)(half & 0x7fff) << 13};
    b.f *= 0x1p112f; /* the exponent's bias; a subnormal number becomes a normal one */
    b.u |= b.f >= 65536.0f ? 0x7f800000u : 0u;
    b.u |= (uint32_t)(half & 0x8000) << 16;
    return b.f;
}

/* Rounded to the nearest, ties to even, as the addition of a number of the right size does. */
INLINE uint16_t to_half(float x) {
    Bits b = {.f = x}, size, sum;
    float base = ((x < 0 ? -x : x) * 0x1p112f) * 0x1p-110f; /* infinite from 65536 on */
    uint32_t twice = b.u + b.u, exponent = twice & 0xff000000u;
    size.u = ((exponent < 0x71000000u ? 0x71000000u : exponent) >> 1) + 0x07800000u;
    sum.f = size.f + base;
    uint32_t rounded = ((sum.u >> 13) & 0x7c00u) + (sum.u & 0x0fffu);
    return (uint16_t)((b.u >> 16 & 0x8000u) | (twice > 0xff000000u ? 0x7e00u : rounded));
}

INLINE float load(const void *row, int64_t j, int type) {
    if (type == BFLOAT16) {
        Bits b = {.u = (uint32_t)((const uint16_t *)row)[j] << 16};
        return b.f;
    }
    if (type == FLOAT16) return from_half(((const uint16_t *)row)[j]);
    return ((const float *)row)[j];
}

INLINE void store(void *row, int64_t j, float x, int type) {
    if (type == BFLOAT16) {
        Bits b = {.f = x};
        uint32_t rounded = (b.u + 0x7fffu + ((b.u >> 16) & 1)) >> 16;
        ((uint16_t *)row)[j] = (uint16_t)(x != x ? 0x7fc0u : rounded);
    } else if (type == FLOAT16) {
        ((uint16_t *)row)[j] = to_half(x);
    } else {
        ((float *)row)[j] = x;
    }
}

/* Bytes of so many entries. */
INLINE int64_t bytes(int64_t entries, int type) { return entries * (type == FLOAT32 ? 4 : 2); }

/* e^x for x <= 0, within 2 units in the last place; 0 below the smallest normal number. NaN stays. */
INLINE float expo(float x) {
    float bounded = x < -87.33654f ? -87.33654f : x;
    Bits shifted = {.f = bounded * 1.44269504f + 12582912.0f}; /* 1.5 * 2^23: rounds to an integer */
    float n = shifted.f - 12582912.0f;
    float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    Bits power = {.u = (shifted.u + 127u) << 23};
    float value = p * power.f;
    return x < -87.33654f ? 0.0f : value;
}

INLINE float tanh_of(float x) {
    float a = x < 0 ? -x : x, e = expo(-2.0f * a), square = x * x;
    float large = (1.0f - e) / (1.0f + e);
    float p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    float small = p * square * x + x;
    large = x < 0 ? -large : large;
    return a < 0.625f ? small : large;
}

/* An entry under the cap; `slope` is the cap's derivative there. */
INLINE float capped(const void *row, int64_t j, int type, int has_cap, float cap, float *slope) {
    float x = load(row, j, type);
    *slope = 1.0f;
    if (!has_cap) return x;
    float share = tanh_of(x / cap);
    *slope = 1.0f - share * share;
    return share * cap;
}

INLINE float entry(const void *row, int64_t j, int type, int has_cap, float cap) {
    float slope;
    return capped(row, j, type, has_cap, cap, &slope);
}

/* By integers that order as the entries do: compilers start a maximum of floats at the lowest finite
   number, or at -inf, or do not vectorise it. A NaN may be passed over; it shows in the sum. */
INLINE float largest(const void *row, int64_t from, int64_t to, int type, int has_cap, float cap) {
    int32_t top = INT32_MIN;
#pragma omp simd reduction(max : top)
    for (int64_t j = from; j < to; j++) {
        Bits b = {.f = entry(row, j, type, has_cap, cap)};
        int32_t key = b.i ^ ((b.i >> 31) & 0x7fffffff);
        top = key > top ? key : top;
    }
    Bits b = {.i = top ^ ((top >> 31) & 0x7fffffff)};
    return b.f;
}

/* A maximum and a sum of exponentials less it, block by block. */
typedef struct { float top; double sum; } Sum;

/* Take a block's maximum in; returns what earlier sums are worth, and in `shift` what to subtract. */
INLINE double raise(Sum *s, float top, float *shift) {
    double share = 1.0;
    if (top > s->top) {
        share = exp((double)s->top - (double)top);
        s->sum *= share;
        s->top = top;
    }
    *shift = s->top == -INFINITY ? 0.0f : s->top; /* nothing but masked entries so far */
    return share;
}

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE void fill(void *row, int64_t columns, float x, int type) {
    if (x == 0.0f) {
        memset(row, 0, bytes(columns, type));
        return;
    }
    for (int64_t j = 0; j < columns; j++) store(row, j, x, type);
}

INLINE const void *at(const void *base, int64_t entries, int type) {
    return (const char *)base + bytes(entries, type);
}

/* ---- cross-entropy ---- */

INLINE void cross_entropy_row(const Args *a, int64_t i, void *scratch, int type, int has_cap) {
    const void *z = at(a->logits, i * a->stride, type);
    void *grad = a->grad ? (void *)at(a->grad, i * a->grad_stride, type) : NULL;
    int64_t label = ((const int64_t *)a->labels)[i], V = a->columns;
    float cap = a->softcap;
    float *state = a->state ? a->state + 4 * i : NULL;
    (void)scratch;
    if (label == a->ignore_index) {
        if (a->losses) a->losses[i] = 0.0f;
        if (a->losses && state) state[3] = 1.0f;
        if (grad) fill(grad, V, 0.0f, type);
        return;
    }
    float at_label_slope, at_label = capped(z, label, type, has_cap, cap, &at_label_slope);
    float top, sum;
    if (a->losses) {
        Sum s = {-INFINITY, 0.0};
        for (int64_t from = 0; from < V; from += BLOCK) {
            int64_t to = smaller(from + BLOCK, V);
            float shift, part = 0.0f;
            raise(&s, largest(z, from, to, type, has_cap, cap), &shift);
#pragma omp simd reduction(+ : part)
            for (int64_t j = from; j < to; j++)
                part += expo(entry(z, j, type, has_cap, cap) - shift);
            s.sum += part;
        }
        a->losses[i] = (float)(((double)s.top - (double)at_label) + log(s.sum));
        top = s.top, sum = (float)s.sum;
        if (state) state[0] = top, state[1] = sum, state[3] = 1.0f;
    } else {
        top = state[0], sum = state[1];
    }
    if (!grad) return;
    float w = a->weights ? a->weights[i] : 1.0f, share = w / sum;
#pragma omp simd
    for (int64_t j = 0; j < V; j++) {
        float slope, x = capped(z, j, type, has_cap, cap, &slope);
        store(grad, j, expo(x - top) * share * slope, type);
    }
    store(grad, label, (expo(at_label - top) / sum - 1.0f) * at_label_slope * w, type);
}

/* ---- Kullback-Leibler divergence ---- */

/* Whether a row holds NaN or +inf, and whether `b` is masked where `a` is not. */
static void look(const void *a, const void *b, int64_t V, int type, int a_has, float a_cap,
                 int b_has, float b_cap, int *bad, int *lacking) {
    *bad = *lacking = 0;
    for (int64_t j = 0; j < V; j++) {
        float x = entry(a, j, type, a_has, a_cap), y = entry(b, j, type, b_has, b_cap);
        *bad |= !(x < INFINITY) | !(y < INFINITY);
        *lacking |= (x != -INFINITY) & (y == -INFINITY);
    }
}

/* -> KL(p || q), p and q the softmax of `a` and `b`; their maxima and sums, and in `mean` the mean
   of a - b under p. */
INLINE float kl_statistics(const void *a, const void *b, int64_t V, int type, int a_has,
                           float a_cap, int b_has, float b_cap, Sum *p, Sum *q, float *mean) {
    double dot = 0.0;
    float center = 0.0f; /* near a - b, which may be far from 0, where p is large */
    *p = *q = (Sum){-INFINITY, 0.0};
    for (int64_t from = 0; from < V; from += BLOCK) {
        int64_t to = smaller(from + BLOCK, V);
        float p_shift, q_shift, p_part = 0.0f, q_part = 0.0f, part = 0.0f;
        dot *= raise(p, largest(a, from, to, type, a_has, a_cap), &p_shift);
        raise(q, largest(b, from, to, type, b_has, b_cap), &q_shift);
        if (p->top != -INFINITY && q->top != -INFINITY && p->top - q->top != center) {
            float next = p->top - q->top;
            dot += p->sum * ((double)center - next);
            center = next;
        }
#pragma omp simd reduction(+ : p_part, q_part, part)
        for (int64_t j = from; j < to; j++) {
            float x = entry(a, j, type, a_has, a_cap), y = entry(b, j, type, b_has, b_cap);
            float e = expo(x - p_shift), term = e * (x - y - center);
            p_part += e;
            q_part += expo(y - q_shift);
            part += x == -INFINITY ? 0.0f : term;
        }
        p->sum += p_part;
        q->sum += q_part;
        dot += part;
    }
    if (p->top == -INFINITY && p->sum == 0.0) { /* a is masked as a whole */
        *mean = 0.0f;
        return q->sum == q->sum && q->top < INFINITY ? 0.0f : NAN;
    }
    double centered = dot / p->sum;
    *mean = (float)(centered + center);
    double between = (double)p->top - (double)q->top - (double)center;
    float kl = (float)(centered - between - log(p->sum) + log(q->sum));
    if (!isfinite(kl)) {
        int bad, lacking;
        look(a, b, V, type, a_has, a_cap, b_has, b_cap, &bad, &lacking);
        kl = bad ? NAN : lacking ? INFINITY : kl;
    }
    return kl;
}

INLINE void kl_row(const Args *a, int64_t i, void *scratch, int type, int has_cap) {
    const void *z = at(a->logits, i * a->stride, type);
    const void *r = at(a->ref_logits, i * a->ref_stride, type);
    void *grad = a->grad ? (void *)at(a->grad, i * a->grad_stride, type) : NULL;
    float *state = a->state ? a->state + 4 * i : NULL, own[4];
    float cap = a->softcap, r_cap = a->ref_softcap;
    int r_has = has_cap && r_cap != 0.0f, z_has = has_cap && cap != 0.0f;
    int64_t V = a->columns;
    (void)scratch;
    /* for the gradient: maximum and sum of z; those of r (forward) or the mean of z - r and 1 */
    if (a->losses) {
        Sum p, q;
        float mean, kl;
        if (!state) state = own;
        if (a->forward_kl) {
            kl = kl_statistics(r, z, V, type, r_has, r_cap, z_has, cap, &q, &p, &mean);
            state[2] = q.top, state[3] = q.sum == 0.0 ? 1.0f : (float)q.sum;
        } else {
            kl = kl_statistics(z, r, V, type, z_has, cap, r_has, r_cap, &p, &q, &mean);
            state[2] = mean, state[3] = 1.0f;
        }
        state[0] = p.top;
        /* NaN spoils the gradient; 0 stands for none, of a divergence from nothing */
        state[1] = !isfinite(kl) ? NAN : (a->forward_kl ? q.sum : p.sum) == 0.0 ? 0.0f : (float)p.sum;
        a->losses[i] = kl;
    }
    if (!grad) return;
    float top = state[0], sum = state[1], third = state[2], w = a->weights ? a->weights[i] : 1.0f;
    if (sum == 0.0f || sum != sum) {
        fill(grad, V, sum == 0.0f ? 0.0f * w : NAN, type);
        return;
    }
    float share = w / sum, r_share = w / state[3];
    if (a->forward_kl) {
#pragma omp simd
        for (int64_t j = 0; j < V; j++) {
            float slope, x = capped(z, j, type, z_has, cap, &slope);
            float y = entry(r, j, type, r_has, r_cap);
            store(grad, j, (expo(x - top) * share - expo(y - third) * r_share) * slope, type);
        }
        return;
    }
#pragma omp simd
    for (int64_t j = 0; j < V; j++) {
        float slope, x = capped(z, j, type, z_has, cap, &slope);
        float y = entry(r, j, type, r_has, r_cap);
        float g = expo(x - top) * ((x - y) - third) * share * slope;
        store(grad, j, x == -INFINITY ? 0.0f : g, type);
    }
}

/* ---- the k largest entries ---- */

/* An integer that orders as the entry does: -0.0 as 0.0, NaN above all. */
INLINE int32_t key_of(const void *row, int64_t j, int type) {
    Bits b = {.f = load(row, j, type) + 0.0f}; /* -0.0 + 0.0 is 0.0 */
    int32_t key = b.i ^ ((b.i >> 31) & 0x7fffffff);
    return (b.u & 0x7fffffffu) > 0x7f800000u ? INT32_MAX : key;
}

/* The k-th largest of n keys, and how many are larger: by digits, the highest first. */
static int32_t kth_largest(const int32_t *keys, int64_t n, int64_t k, int64_t *larger) {
    static const int shifts[3] = {21, 10, 0}, widths[3] = {11, 11, 10};
    uint32_t found = 0, known = 0;
    int64_t above = 0;
    for (int digit = 0; digit < 3; digit++) {
        uint32_t counts[2048] = {0};
        uint32_t shift = shifts[digit], mask = (1u << widths[digit]) - 1;
        for (int64_t j = 0; j < n; j++) {
            uint32_t key = (uint32_t)keys[j] ^ 0x80000000u;
            if ((key & known) == found) counts[(key >> shift) & mask]++;
        }
        uint32_t value = mask;
        while (above + counts[value] < k) above += counts[value--];
        found |= value << shift;
        known |= mask << shift;
    }
    *larger = above;
    return (int32_t)(found ^ 0x80000000u);
}

/* int32 entries of scratch that `choose` needs. */
INLINE int64_t choose_needs(int64_t V) { return (V / SEGMENTS + 1) * LANES + 2 * (V + SEGMENTS); }

/* Write the indices of the k largest entries, ascending, ties to the lowest index; returns whether
   a NaN is among them. The k-th largest of the maxima of many segments is no larger than the k-th
   largest entry: only entries from there on are looked at twice. */
INLINE int choose(const void *row, int64_t V, int64_t k, int type, int32_t *chosen, int32_t *scratch) {
    if (k >= V) {
        int has_nan = 0;
        for (int64_t j = 0; j < V; j++) {
            float x = load(row, j, type);
            has_nan |= x != x;
            chosen[j] = (int32_t)j;
        }
        return has_nan;
    }
    int64_t blocks = (V + SEGMENTS - 1) / SEGMENTS, n = 0, larger;
    int32_t *maxima = scratch, *keys = maxima + blocks * LANES, *columns = keys + V + SEGMENTS;
    int32_t bound = INT32_MIN;
    int by_maxima = k <= blocks * LANES / 2;
    if (by_maxima) {
        for (int64_t b = 0; b < blocks; b++) {
            int32_t top[LANES];
            for (int l = 0; l < LANES; l++) top[l] = INT32_MIN;
            int64_t from = b * SEGMENTS;
            if (from + SEGMENTS <= V) {
#pragma omp simd
                for (int l = 0; l < LANES; l++) {
                    int32_t most = INT32_MIN;
#pragma GCC unroll 16
                    for (int t = 0; t < SEGMENTS / LANES; t++) {
                        int32_t key = key_of(row, from + t * LANES + l, type);
                        most = key > most ? key : most;
                    }
                    top[l] = most;
                }
            } else {
                for (int64_t j = from; j < V; j++) {
                    int32_t key = key_of(row, j, type);
                    if (key > top[(j - from) % LANES]) top[(j - from) % LANES] = key;
                }
            }
            memcpy(maxima + b * LANES, top, sizeof top);
        }
        bound = kth_largest(maxima, blocks * LANES, k, &larger);
    }
    for (int64_t b = 0; b < blocks; b++) {
        int64_t from = b * SEGMENTS, to = smaller(from + SEGMENTS, V);
        int32_t block[SEGMENTS], any = !by_maxima;
        if (by_maxima)
            for (int l = 0; l < LANES; l++) any |= maxima[b * LANES + l] >= bound;
        if (!any) continue;
        for (int64_t j = from; j < to; j++) block[j - from] = key_of(row, j, type);
        for (int64_t j = from; j < to; j++) { /* without a branch: written, kept or not */
            keys[n] = block[j - from];
            columns[n] = (int32_t)j;
            n += block[j - from] >= bound;
        }
    }
    int32_t threshold = kth_largest(keys, n, k, &larger);
    int64_t ties = k - larger, taken = 0;
    int has_nan = 0;
    for (int64_t j = 0; j < n && taken < k; j++) {
        int tie = keys[j] == threshold && ties > 0;
        ties -= tie;
        chosen[taken] = columns[j];
        if (keys[j] > threshold || tie) {
            has_nan |= keys[j] == INT32_MAX;
            taken++;
        }
    }
    return has_nan;
}

static int choose_of(const void *row, int64_t V, int64_t k, int type, int32_t *chosen, int32_t *scratch) {
    switch (type) {
    case BFLOAT16: return choose(row, V, k, BFLOAT16, chosen, scratch);
    case FLOAT16: return choose(row, V, k, FLOAT16, chosen, scratch);
    default: return choose(row, V, k, FLOAT32, chosen, scratch);
    }
}

INLINE void topk_row(const Args *a, int64_t i, void *scratch, int type, int has_cap) {
    (void)has_cap;
    choose_of(at(a->logits, i * a->stride, type), a->columns, a->k, type, a->chosen + i * a->k, scratch);
}

/* ---- flatten and entropy ---- */

INLINE int64_t index_of(const Args *a, int64_t i, int64_t j) {
    if (a->wide_indices) return ((const int64_t *)a->indices)[i * a->k + j];
    return ((const int32_t *)a->indices)[i * a->k + j];
}

/* Loss of a row and, into `slopes`, what each entry of S has of the gradient by itself. */
static float flatten_of(const float *z, int64_t k, double center, int local, float *slopes, double *sum) {
    double total = 0.0, squares = 0.0, deviations = 0.0;
    int32_t masked = 0;
#pragma omp simd reduction(+ : total, masked)
    for (int64_t j = 0; j < k; j++) {
        masked += z[j] == -INFINITY;
        total += z[j] == -INFINITY ? 0.0f : z[j];
    }
    double live = k > masked ? (double)(k - masked) : 1.0, share = 2.0 / live;
    if (local) center = total / live;
#pragma omp simd reduction(+ : squares, deviations)
    for (int64_t j = 0; j < k; j++) {
        double deviation = z[j] == -INFINITY ? 0.0 : z[j] - center;
        squares += deviation * deviation;
        deviations += deviation;
        slopes[j] = (float)(deviation * share);
    }
    *sum = deviations * share;
    return (float)(squares / live);
}

static float entropy_of(const float *z, int64_t k, float *slopes) {
    double total = 0.0, negative = 0.0;
    float top = largest(z, 0, k, FLOAT32, 0, 0.0f);
    int32_t masked = 0;
    if (top == -INFINITY) { /* S is masked as a whole */
        memset(slopes, 0, k * sizeof *slopes);
        return 0.0f;
    }
#pragma omp simd reduction(+ : total, masked)
    for (int64_t j = 0; j < k; j++) {
        masked += z[j] == -INFINITY;
        slopes[j] = expo(z[j] - top);
        total += slopes[j];
    }
    double log_total = log(total);
    float shift = (float)(top + log_total), rest = (float)(top + log_total - shift);
#pragma omp simd reduction(+ : negative)
    for (int64_t j = 0; j < k; j++) {
        float log_q = (z[j] - shift) - rest, term = slopes[j] * log_q;
        negative += z[j] == -INFINITY ? 0.0f : term;
    }
    negative /= total;
    float share = (float)(1.0 / total), entropy = (float)-negative;
#pragma omp simd
    for (int64_t j = 0; j < k; j++) {
        float log_q = (z[j] - shift) - rest, slope = slopes[j] * share * (log_q + entropy);
        slopes[j] = z[j] == -INFINITY ? 0.0f : slope;
    }
    return (float)(log((double)(k - masked)) + negative);
}

INLINE void local_entropy_row(const Args *given, int64_t i, void *scratch, int type, int has_cap) {
    Args args = *given, *a = &args;
    const void *z = at(a->logits, i * a->stride, type);
    void *grad = a->grad ? (void *)at(a->grad, i * a->grad_stride, type) : NULL;
    float *state = a->state ? a->state + 4 * i : NULL;
    int64_t V = a->columns, k = a->k, first = i;
    float *z_s = scratch, *slopes = z_s + k, *cap_slopes = slopes + k;
    int32_t *rest = (int32_t *)(cap_slopes + k);
    int spoiled = 0;
    if (!a->indices) {
        int32_t *chosen = a->chosen ? a->chosen + i * k : rest;
        const void *scores = a->select_by_current ? z : at(a->ref_logits, i * a->ref_stride, type);
        spoiled = choose_of(scores, V, k, type, chosen, rest + k);
        a->indices = chosen, a->wide_indices = 0, first = 0;
    }
    double mean, live;
    if (a->losses) {
        double total = 0.0;
        int32_t masked = 0, has_nan = 0;
        if (a->objective == FLATTEN_GLOBAL) {
#pragma omp simd reduction(+ : total, masked)
            for (int64_t j = 0; j < V; j++) {
                float x = entry(z, j, type, has_cap, a->softcap);
                masked += x == -INFINITY;
                total += x == -INFINITY ? 0.0f : x;
            }
        } else {
#pragma omp simd reduction(| : has_nan)
            for (int64_t j = 0; j < V; j++) {
                float x = load(z, j, type);
                has_nan |= x != x;
            }
        }
        live = V - masked;
        mean = total / (live > 0.0 ? live : 1.0);
        if (spoiled || has_nan) mean = NAN;
    } else {
        mean = (double)state[0] + (double)state[1], live = state[2];
    }
    float w = a->weights ? a->weights[i] : 1.0f;
    if (a->losses && state) {
        state[0] = (float)mean;
        state[1] = isfinite(mean) ? (float)(mean - state[0]) : 0.0f;
        state[2] = (float)live, state[3] = 1.0f;
    }
    if (mean != mean) { /* a NaN anywhere in the row or in its reference's */
        if (a->losses) a->losses[i] = NAN;
        if (grad) fill(grad, V, NAN, type);
        return;
    }
    float *values = a->values ? a->values + i * k : NULL;
    if (a->losses || !values) { /* after the row was read as a whole, where it was */
        for (int64_t j = 0; j < k; j++) z_s[j] = load(z, index_of(a, first, j), type);
        if (values) memcpy(values, z_s, k * sizeof *z_s);
    } else {
        memcpy(z_s, values, k * sizeof *z_s);
    }
    for (int64_t j = 0; j < k; j++)
        z_s[j] = capped(z_s, j, FLOAT32, has_cap, a->softcap, cap_slopes + j);
    double sum = 0.0, center = a->objective == FLATTEN_GLOBAL ? mean : a->center;
    float loss = a->objective == ENTROPY
                     ? entropy_of(z_s, k, slopes)
                     : flatten_of(z_s, k, center, a->objective == FLATTEN_LOCAL, slopes, &sum);
    if (a->losses) a->losses[i] = loss;
    if (!grad) return;
    float off_s = a->objective == FLATTEN_GLOBAL ? (float)(-sum / (live > 0.0 ? live : 1.0)) : 0.0f;
    if (off_s != 0.0f && (has_cap || live < V)) {
#pragma omp simd
        for (int64_t j = 0; j < V; j++) {
            float slope, x = capped(z, j, type, has_cap, a->softcap, &slope);
            store(grad, j, x == -INFINITY ? 0.0f : off_s * slope * w, type);
        }
    } else {
        fill(grad, V, off_s * w, type);
    }
    for (int64_t j = 0; j < k; j++) {
        float g = (slopes[j] + off_s) * cap_slopes[j] * w;
        slopes[j] = z_s[j] == -INFINITY ? 0.0f : g;
    }
    for (int64_t j = 0; j < k; j++) store(grad, index_of(a, first, j), slopes[j], type);
}

INLINE void indices_row(const Args *a, int64_t i, void *scratch, int type, int has_cap) {
    uint8_t *seen = scratch;
    int32_t bad = 0;
    (void)type, (void)has_cap;
    memset(seen, 0, a->columns / 8 + 1);
    for (int64_t j = 0; j < a->k; j++) {
        int64_t column = index_of(a, i, j);
        if (column < 0 || column >= a->columns) {
            bad = 1;
            continue;
        }
        uint8_t bit = (uint8_t)(1 << (column & 7));
        bad |= seen[column >> 3] & bit;
        seen[column >> 3] |= bit;
    }
    a->bad[i] = bad;
}

/* ---- rows over threads ---- */

typedef void (*Row)(const Args *, int64_t, void *);
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */

typedef struct {
    const Args *args;
    Row row;
    int64_t next, step, scratch;
    int failed;
} Job;

static void work(void *given) {
    Job *job = given;
    void *scratch = job->scratch ? malloc(job->scratch) : NULL;
    if (job->scratch && !scratch) {
        __atomic_store_n(&job->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    for (;;) {
        int64_t from = __atomic_fetch_add(&job->next, job->step, __ATOMIC_RELAXED);
        if (from >= job->args->rows) break;
        int64_t to = smaller(from + job->step, job->args->rows);
        for (int64_t i = from; i < to; i++) job->row(job->args, i, scratch);
    }
    free(scratch);
}

#define VARIANT(name, type, cap) \
    static void name##_##type##_##cap(const Args *a, int64_t i, void *scratch) { \
        name(a, i, scratch, type, cap); \
    }
#define VARIANTS(name) \
    VARIANT(name, FLOAT32, 0) VARIANT(name, FLOAT32, 1) VARIANT(name, BFLOAT16, 0) \
    VARIANT(name, BFLOAT16, 1) VARIANT(name, FLOAT16, 0) VARIANT(name, FLOAT16, 1) \
    static const Row name##s[TYPES][2] = { \
        {name##_FLOAT32_0, name##_FLOAT32_1}, \
        {name##_BFLOAT16_0, name##_BFLOAT16_1}, \
        {name##_FLOAT16_0, name##_FLOAT16_1}, \
    };
VARIANTS(cross_entropy_row)
VARIANTS(kl_row)
VARIANTS(topk_row)
VARIANTS(local_entropy_row)
VARIANT(indices_row, FLOAT32, 0)

int64_t palu_args_size(void) { return sizeof(Args); }

/* The rows of operator `kind` on `threads` threads in one parallel region, by the GOMP_parallel of
   the OpenMP runtime that PyTorch uses; without one, on this thread. Returns 1 for lack of memory. */
int palu_rows(const Args *a, int kind, Parallel parallel, int threads) {
    const Row(*tables[])[2] = {cross_entropy_rows, kl_rows, topk_rows, local_entropy_rows};
    int has_cap = a->softcap != 0.0f || a->ref_softcap != 0.0f;
    Job job = {.args = a, .step = 1 + 16384 / (a->columns + 1)};
    job.row = kind == INDICES ? indices_row_FLOAT32_0 : tables[kind][a->type][has_cap];
    if (kind == TOPK) job.scratch = 4 * choose_needs(a->columns);
    if (kind == LOCAL_ENTROPY)
        job.scratch = 4 * (4 * a->k + (a->indices ? 0 : choose_needs(a->columns)));
    if (kind == INDICES) job.scratch = a->columns / 8 + 1;
    int64_t entries = a->rows * (kind == INDICES ? a->k : a->columns);
    if (parallel && threads > 1 && a->rows > job.step && entries > WORTH_THREADS) {
        parallel(work, &job, (unsigned)threads, 0);
    } else {
        work(&job);
    }
    return job.failed;
}
