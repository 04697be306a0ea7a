// Grid 0 holds the even multiples of a step, grid 1 zero and the odd ones:
//     index k -> 2k (grid 0),  2k - sign(k) (grid 1)
// and a four-state machine driven by the parity of k says which grid comes next:
//     next = (((state & 1) ^ (k & 1)) << 1) | (state >> 1),  grid = state >> 1
// (the trellis-coded quantiser of VVC, ITU-T H.266 8.7.3; Schwarz et al. 2019). The encoder finds
// the cheapest path down each segment of rows by the Viterbi algorithm.
#include "trellis.h"

#include <cmath>
#include <vector>

namespace waterfill {
namespace WATERFILL_ISA {
namespace {

// The nearest index of each (grid, parity), and its squared error, all in units of the step.
struct Candidates {
    float cost[4];  // grid * 2 + parity
};

inline float square(float x) { return x * x; }

inline float nearest_even_grid0(float x) { return 2.0f * std::nearbyint(x * 0.25f); }
inline float nearest_odd_grid0(float x) { return 2.0f * std::nearbyint((x - 2.0f) * 0.25f) + 1.0f; }
inline float nearest_odd_grid1(float magnitude) {
    float i = std::nearbyint((magnitude - 1.0f) * 0.25f);
    return 2.0f * (i > 0.0f ? i : 0.0f) + 1.0f;
}
inline float nearest_even_grid1(float magnitude) {
    float i = std::nearbyint((magnitude - 3.0f) * 0.25f);
    return magnitude < 1.5f ? 0.0f : 2.0f * (i > 0.0f ? i : 0.0f) + 2.0f;
}

// Costs of the four kinds of index for rows of one column; a plain loop that vectorises.
void price(const float* x, size_t n, float* c00, float* c01, float* c10, float* c11) {
    for (size_t r = 0; r < n; ++r) {
        float v = x[r], a = std::fabs(v);
        c00[r] = square(v - 2.0f * nearest_even_grid0(v));
        c01[r] = square(v - 2.0f * nearest_odd_grid0(v));
        float even = nearest_even_grid1(a), odd = nearest_odd_grid1(a);
        c10[r] = square(a - (even > 0.0f ? 2.0f * even - 1.0f : 0.0f));
        c11[r] = square(a - (2.0f * odd - 1.0f));
    }
}

struct Scratch {
    std::vector<float> x, c00, c01, c10, c11;
    std::vector<uint8_t> decision;  // bit s: the parity by which state s was entered
    explicit Scratch(size_t n) : x(n), c00(n), c01(n), c10(n), c11(n), decision(n) {}
};

// Viterbi over n rows; leaves in `decision` the parity of the index at each row's best path.
void viterbi(Scratch& s, size_t n) {
    const float far = 1e30f;
    float d0 = 0.0f, d1 = far, d2 = far, d3 = far;
    for (size_t r = 0; r < n; ++r) {
        float e0 = s.c00[r], o0 = s.c01[r], e1 = s.c10[r], o1 = s.c11[r];
        // state 0 is entered from 0 by even, from 1 by odd; 2 from 0 by odd, from 1 by even;
        // 1 from 2 by even, from 3 by odd; 3 from 2 by odd, from 3 by even.
        float a0 = d0 + e0, b0 = d1 + o0, a2 = d1 + e0, b2 = d0 + o0;
        float a1 = d2 + e1, b1 = d3 + o1, a3 = d3 + e1, b3 = d2 + o1;
        s.decision[r] = static_cast<uint8_t>((b0 < a0) | (b1 < a1) << 1 | (b2 < a2) << 2 | (b3 < a3) << 3);
        d0 = b0 < a0 ? b0 : a0;
        d1 = b1 < a1 ? b1 : a1;
        d2 = b2 < a2 ? b2 : a2;
        d3 = b3 < a3 ? b3 : a3;
        // Keep the accumulated cost small, so that float32 still tells neighbours apart.
        if ((r & 63) == 63) {
            float low = std::fmin(std::fmin(d0, d1), std::fmin(d2, d3));
            d0 -= low, d1 -= low, d2 -= low, d3 -= low;
        }
    }
    int state = 0;
    float best = d0;
    if (d1 < best) best = d1, state = 1;
    if (d2 < best) best = d2, state = 2;
    if (d3 < best) best = d3, state = 3;
    for (size_t r = n; r-- > 0;) {
        int parity = (s.decision[r] >> state) & 1;
        int grid = state & 1;                                     // next = .. | (previous >> 1)
        int previous = (grid << 1) | (((state >> 1) & 1) ^ parity);
        s.decision[r] = static_cast<uint8_t>(grid << 1 | parity);
        state = previous;
    }
}

void path_to_index(const Scratch& s, size_t n, int32_t* index, float* level) {
    for (size_t r = 0; r < n; ++r) {
        float v = s.x[r], a = std::fabs(v);
        int kind = s.decision[r];
        float even1 = nearest_even_grid1(a), odd1 = nearest_odd_grid1(a);
        float k0 = (kind & 1) ? nearest_odd_grid0(v) : nearest_even_grid0(v);
        float k1 = (kind & 1) ? odd1 : even1;
        float l1 = k1 > 0.0f ? 2.0f * k1 - 1.0f : 0.0f;
        float k = (kind & 2) ? std::copysign(k1, v) : k0;
        index[r] = static_cast<int32_t>(k);
        level[r] = (kind & 2) ? std::copysign(l1, v) : 2.0f * k0;
    }
}

void column(const TrellisBlock& b, size_t j, size_t first, size_t n, Scratch& s, float* level) {
    const float* target = b.target + j * b.rows + first;
    int32_t* index = b.index + j * b.rows + first;
    // Beyond 2^23 steps float32 no longer knows parity; such a step is far below the noise anyway.
    const float inverse = 1.0f / b.step[j], limit = 4.0e6f;
    for (size_t r = 0; r < n; ++r) {
        float v = target[r] * inverse;
        s.x[r] = v > limit ? limit : v < -limit ? -limit : v;
    }
    if (b.states == 1) {
        for (size_t r = 0; r < n; ++r) {
            level[r] = std::nearbyint(s.x[r]);
            index[r] = static_cast<int32_t>(level[r]);
        }
        return;
    }
    price(s.x.data(), n, s.c00.data(), s.c01.data(), s.c10.data(), s.c11.data());
    viterbi(s, n);
    path_to_index(s, n, index, level);
}

void quantise(const TrellisBlock& b, size_t first_row, size_t last_row) {
    Scratch scratch(b.segment);
    std::vector<float> level(b.segment);
    for (size_t first = first_row; first < last_row; first += b.segment) {
        size_t n = last_row - first < b.segment ? last_row - first : b.segment;
        for (size_t j = b.columns; j-- > 0;) {
            column(b, j, first, n, scratch, level.data());
            const float* weight = b.weight + j * b.rows + first;
            float* error = b.error + j * b.rows + first;
            for (size_t r = 0; r < n; ++r) error[r] = weight[r] - level[r] * b.step[j];
            for (size_t i = 0; i < j; ++i) {
                float c = b.carry[j * b.columns + i];
                float* target = b.target + i * b.rows + first;
                for (size_t r = 0; r < n; ++r) target[r] += error[r] * c;
            }
        }
    }
}

void walk(const int32_t* index, size_t rows, size_t columns, size_t segment, int states,
          const float* step, float* out) {
    std::vector<int32_t> state(columns, 0);
    for (size_t r = 0; r < rows; ++r) {
        const int32_t* k = index + r * columns;
        float* o = out + r * columns;
        if (states == 1) {
            for (size_t c = 0; c < columns; ++c) o[c] = static_cast<float>(k[c]) * step[c];
            continue;
        }
        if (r % segment == 0) state.assign(columns, 0);
        int32_t* s = state.data();
        for (size_t c = 0; c < columns; ++c) {
            // 64-bit, because 2k of a hostile index may not fit 32.
            int32_t v = k[c], sign = (v > 0) - (v < 0);
            int64_t level = 2 * static_cast<int64_t>(v) - ((s[c] >> 1) ? sign : 0);
            o[c] = static_cast<float>(level) * step[c];
            s[c] = (((s[c] & 1) ^ (v & 1)) << 1) | (s[c] >> 1);
        }
    }
}

}  // namespace

TrellisKernels trellis_kernels() { return {quantise, walk}; }

}  // namespace WATERFILL_ISA
}  // namespace waterfill
