// Activations rounded to integers, a scale for each chunk of columns.
#pragma once
#include <algorithm>

#include "packed.h"
#include "packed_floats.h"

namespace waterfill::WATERFILL_ISA {
namespace {

constexpr size_t kChunk = packed::kChunkTiles * packed::kColumns;
constexpr float kSmallest = 0x1p-100f;  // a chunk of nothing larger counts as zeros

// To the nearest integer, ties to even, below 2^22: no instruction set lacks an addition.
inline float nearest(float x) { return (x + 12582912.0f) - 12582912.0f; }

// Tokens that go through a kernel together, and where their planes lie.
struct Pass {
    size_t first, tokens;  // of the batch
    int8_t* levels;
    int32_t* sums;
    float* scales;
};

// Cuts a batch into passes of 1, 2, 4 ... tokens, `most` planes together at most; says how many.
inline size_t passes_of(const packed::Matrix& matrix, const packed::Activations& x, size_t most, Pass* out) {
    size_t count = 0;
    for (size_t first = 0, tokens; first < x.batch; first += tokens) {
        for (tokens = most / x.planes; tokens > x.batch - first;) tokens /= 2;
        const size_t before = first * x.planes;
        out[count++] = {first, tokens, x.levels + matrix.tiles * packed::kColumns * before, x.sums + matrix.chunks * before, x.scales + matrix.chunks * first};
    }
    return count;
}

// One token's chunk of `count` columns (a multiple of 4): its planes' dwords lie `stride` bytes apart.
inline float quantise_chunk(const float* __restrict values, size_t count, unsigned planes, size_t stride, int8_t* out, int32_t* sums) {
    uint32_t top = 0;
    for (size_t i = 0; i < count; ++i) top = std::max(top, bits_of(values[i]) & 0x7FFFFFFFu);
    const float largest = float_of(top), most = float(planes == 1 ? packed::kLargest : packed::kBase * packed::kLargest + packed::kLargest);
    const bool finite = top < 0x7F800000u, none = !finite || largest < kSmallest;
    const float inverse = none ? 0.0f : most / largest;
    alignas(64) float levels[kChunk];
    alignas(64) int8_t lines[2][kChunk];
    for (size_t i = 0; i < count; ++i) levels[i] = none ? 0.0f : nearest(values[i] * inverse);
    if (planes == 1) {
        for (size_t i = 0; i < count; ++i) lines[0][i] = int8_t(int32_t(levels[i]));
    } else {
        for (size_t i = 0; i < count; ++i) {
            const float upper = nearest(levels[i] * (1.0f / packed::kBase));
            lines[0][i] = int8_t(int32_t(upper)), lines[1][i] = int8_t(int32_t(levels[i] - upper * packed::kBase));
        }
    }
    for (unsigned p = 0; p < planes; ++p) {
        int32_t sum = 0;
        for (size_t i = 0; i < count; ++i) sum += lines[p][i];
        sums[p] = sum;
        for (size_t i = 0; i < count; i += 4) std::memcpy(out + i / 4 * stride + 4 * p, lines[p] + i, 4);
    }
    // What is not a number, or infinite, makes every output of its token so.
    return !finite ? largest - largest : none ? 0.0f : largest / most;
}

template <Float Type> void load_chunk(const packed::Matrix& matrix, const void* token, size_t place, size_t count, float* __restrict out) {
    using Kind = Stored<Type>;
    const auto* x = static_cast<const typename Kind::type*>(token);
    const size_t known = std::min(count, matrix.n - place);
    if (matrix.order) {
        for (size_t i = 0; i < known; ++i) out[i] = Kind::read(x[matrix.order[place + i]]);
    } else {
        for (size_t i = 0; i < known; ++i) out[i] = Kind::read(x[place + i]);
    }
    if (matrix.steps)
        for (size_t i = 0; i < known; ++i) out[i] *= matrix.steps[place + i];
    std::fill(out + known, out + count, 0.0f);
}

template <Float Type> void quantise_as(const packed::Matrix& matrix, const void* x, const packed::Activations& out, size_t most) {
    using Value = typename Stored<Type>::type;
    alignas(64) float values[kChunk];
    Pass passes[packed::kMaxBatch];
    const size_t count = passes_of(matrix, out, most, passes);
    for (const Pass* at = passes; at < passes + count; ++at) {
        const Pass& pass = *at;
        const size_t stride = 4 * pass.tokens * out.planes;
        for (size_t t = 0; t < pass.tokens; ++t) {
            const Value* token = static_cast<const Value*>(x) + (pass.first + t) * matrix.n;
            size_t chunk = 0;
            for (size_t s = 0; s < matrix.n_segments; ++s) {
                const packed::Segment& segment = matrix.segments[s];
                for (size_t tile = 0; tile < segment.tiles; tile += matrix.chunk_tiles, ++chunk) {
                    const size_t place = (segment.first + tile) * packed::kColumns;
                    const size_t count = std::min(matrix.chunk_tiles, segment.tiles - tile) * packed::kColumns;
                    load_chunk<Type>(matrix, token, place, count, values);
                    pass.scales[chunk * pass.tokens + t] = quantise_chunk(values, count, out.planes, stride, pass.levels + place / 4 * stride + 4 * t * out.planes,
                                                                          pass.sums + (chunk * pass.tokens + t) * out.planes);
                    if (matrix.starts)
                        for (size_t i = 0; i < std::min(count, matrix.n - place); ++i) out.values[(place + i) * out.batch + pass.first + t] = values[i];
                }
            }
        }
    }
}

}  // namespace
}  // namespace waterfill::WATERFILL_ISA
