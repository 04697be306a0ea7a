// Grid 0 holds the even multiples of a step, grid 1 the odd ones:
//     index k -> 2k (grid 0),  2k - sign(k), k not zero (grid 1)
// and a machine driven by the parity of k says which grid comes next: entropy-coded trellis-coded
// quantisation (Fischer and Wang 1992). VVC's dependent quantisation (Schwarz et al. 2019) has zero
// on both grids; with the grid as context of the coder that costs 0.02 to 0.1 bit, at every rate
// (docs/flagship.md). The encoder finds the cheapest path down each segment of rows by Viterbi.
#include "trellis.h"

#include <cmath>
#include <utility>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace waterfill {
namespace WATERFILL_ISA {
namespace {

#include "trellis_viterbi.h"

// Written without branches, so that the loops over them become vectors. In units of the step:
// grid 0 has 4i (k even) and 4i + 2 (k odd); grid 1 has +-(4i + 3) (even) and +-(4i + 1) (odd).
inline float square(float x) { return x * x; }
inline float nearest_multiple(float x) { return std::nearbyint(x * 0.25f) * 4.0f; }
inline float not_negative(float x) { return x > 0.0f ? x : 0.0f; }
inline float even0(float x) { return nearest_multiple(x); }
inline float odd0(float x) { return nearest_multiple(x - 2.0f) + 2.0f; }
inline float odd1(float magnitude) { return not_negative(nearest_multiple(magnitude - 1.0f)) + 1.0f; }
inline float even1(float magnitude) { return not_negative(nearest_multiple(magnitude - 3.0f)) + 3.0f; }

struct Scratch {
    size_t n;
    std::vector<float> x, level, prices;  // prices: [grid << 1 | parity][n] squared errors
    std::vector<uint8_t> decisions, kind;  // kind: grid << 1 | parity of the best path
    Scratch(size_t segment, unsigned states)
        : n(segment), x(n), level(n), prices(4 * n), decisions(n * (states < 8 ? 1 : states / 8)), kind(n) {}
};

void price(Scratch& s, size_t n) {
    const float* x = s.x.data();
    float *p0 = s.prices.data(), *p1 = p0 + s.n, *p2 = p1 + s.n, *p3 = p2 + s.n;
    for (size_t r = 0; r < n; ++r) p0[r] = square(x[r] - even0(x[r]));
    for (size_t r = 0; r < n; ++r) p1[r] = square(x[r] - odd0(x[r]));
    for (size_t r = 0; r < n; ++r) p2[r] = square(std::fabs(x[r]) - even1(std::fabs(x[r])));
    for (size_t r = 0; r < n; ++r) p3[r] = square(std::fabs(x[r]) - odd1(std::fabs(x[r])));
}

void viterbi(const TrellisCode& code, Scratch& s, size_t n) {
    const auto run = [&](auto viterbi) { viterbi.run(s.prices.data(), s.n, n, s.decisions.data(), s.kind.data()); };
    switch (code.states) {
        case 4: return run(Viterbi<4>());
        case 8: return run(Viterbi<8>());
        case 16: return run(Viterbi<16>());
        case 32: return run(Viterbi<32>());
        case 64: return run(Viterbi<64>());
        case 128: return run(Viterbi<128>());
        default: return run(Viterbi<256>());
    }
}

void path_to_index(Scratch& s, size_t n, int32_t* index) {
    for (size_t r = 0; r < n; ++r) {
        const float v = s.x[r], a = std::fabs(v), sign = v < 0.0f ? -1.0f : 1.0f;
        const bool odd = s.kind[r] & 1, grid1 = s.kind[r] & 2;
        const float l0 = odd ? odd0(v) : even0(v), l1 = odd ? odd1(a) : even1(a);
        const float level = grid1 ? sign * l1 : l0, away = grid1 ? sign : 0.0f;  // 2k - sign k stands for k
        s.level[r] = level;
        index[r] = static_cast<int32_t>((level + away) * 0.5f);
    }
}

void column(const TrellisBlock& b, size_t j, size_t first, size_t n, Scratch& s) {
    const float* target = b.target + j * b.rows + first;
    int32_t* index = b.index + j * b.rows + first;
    // Beyond 2^23 steps float32 no longer knows parity; such a step is far below the noise anyway.
    const float inverse = 1.0f / b.step[j], limit = 4.0e6f;
    for (size_t r = 0; r < n; ++r) {
        const float v = target[r] * inverse;
        s.x[r] = v > limit ? limit : v < -limit ? -limit : v;
    }
    if (b.code.states == 1) {
        for (size_t r = 0; r < n; ++r) {
            s.level[r] = std::nearbyint(s.x[r]);
            index[r] = static_cast<int32_t>(s.level[r]);
        }
        return;
    }
    price(s, n);
    viterbi(b.code, s, n);
    path_to_index(s, n, index);
}

void quantise(const TrellisBlock& b, size_t first_row, size_t last_row) {
    Scratch scratch(b.segment, b.code.states);
    for (size_t first = first_row; first < last_row; first += b.segment) {
        size_t n = last_row - first < b.segment ? last_row - first : b.segment;
        for (size_t j = b.columns; j-- > 0;) {
            column(b, j, first, n, scratch);
            const float* weight = b.weight + j * b.rows + first;
            float* error = b.error + j * b.rows + first;
            for (size_t r = 0; r < n; ++r) error[r] = weight[r] - scratch.level[r] * b.step[j];
            for (size_t i = 0; i < j; ++i) {
                float c = b.carry[j * b.columns + i];
                float* target = b.target + i * b.rows + first;
                for (size_t r = 0; r < n; ++r) target[r] += error[r] * c;
            }
        }
    }
}

void walk(const TrellisCode& code, const int32_t* index, size_t rows, size_t columns, size_t segment,
          const float* step, float* out) {
    const int32_t feedback = int32_t(code.feedback), input = int32_t(code.input);
    std::vector<int32_t> state(columns, 0);
    for (size_t r = 0; r < rows; ++r) {
        const int32_t* k = index + r * columns;
        float* o = out + r * columns;
        if (code.states == 1) {
            for (size_t c = 0; c < columns; ++c) o[c] = static_cast<float>(k[c]) * step[c];
            continue;
        }
        if (r % segment == 0) state.assign(columns, 0);
        int32_t* s = state.data();
        for (size_t c = 0; c < columns; ++c) {
            // 64-bit, because 2k of a hostile index may not fit 32.
            const int32_t v = k[c], sign = (v > 0) - (v < 0), grid = s[c] & 1;
            const int64_t level = 2 * static_cast<int64_t>(v) - (grid ? sign : 0);
            o[c] = static_cast<float>(level) * step[c];
            s[c] = (s[c] >> 1) ^ (feedback & -grid) ^ (input & -(v & 1));
        }
    }
}

}  // namespace

TrellisKernels trellis_kernels() { return {quantise, walk}; }

}  // namespace WATERFILL_ISA
}  // namespace waterfill
