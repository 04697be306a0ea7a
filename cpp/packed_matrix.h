// Packed matrices for callers: arrays checked, work shared among threads.
#pragma once
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "aligned.h"
#include "dispatch.h"
#include "packed.h"
#include "pool.h"

namespace waterfill::packed {

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::packed_kernels();
    if (isa == Isa::avx2) return avx2::packed_kernels();
#endif
    (void)isa;
    return scalar::packed_kernels();
}

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// The arrays as they come, with their sizes in items.
struct Arrays {
    const int64_t* layout;  // m, n, group, then bits and columns of each segment
    size_t n_layout;
    const uint8_t* codes;
    size_t n_codes;
    const void* scales;
    size_t scales_nbytes;
    bool half;
    const int32_t* order;
    size_t n_order;
    const float* steps;
    size_t n_steps;
    const int64_t* starts;
    size_t n_starts;
    const uint32_t* corrections;
    size_t n_corrections;
};

// Shape, segments and strides; the arrays are not looked at.
inline Matrix geometry_of(const int64_t* layout, size_t count) {
    constexpr int64_t kMost = int64_t(1) << 31;
    require(count >= 5 && count % 2 == 1 && (count - 3) / 2 <= kMaxSegments, "packed: a layout is m, n, group, and bits and columns of 1 to 8 segments");
    for (size_t i = 0; i < count; ++i) require(layout[i] > 0 && layout[i] < kMost, "packed: a layout's numbers are positive");
    Matrix out{};
    out.m = size_t(layout[0]), out.n = size_t(layout[1]), out.n_segments = (count - 3) / 2;
    out.blocks = (out.m + kRows - 1) / kRows;
    size_t columns = 0;
    for (size_t s = 0; s < out.n_segments; ++s) {
        const size_t bits = size_t(layout[3 + 2 * s]), wide = size_t(layout[4 + 2 * s]);
        require(bits >= 2 && bits <= 8, "packed: a segment has 2 to 8 bits");
        require(wide % kColumns == 0 || s + 1 == out.n_segments, "packed: only the last segment may end within a tile");
        const size_t tiles = (wide + kColumns - 1) / kColumns;
        out.segments[s] = {unsigned(bits), out.tiles, tiles, out.block_nbytes};
        out.tiles += tiles, out.block_nbytes += tiles * bits * kVector, columns += wide;
    }
    require(columns == out.n, "packed: the segments' columns are not all columns");
    const size_t group = size_t(layout[2]);
    out.groups = (out.n + group - 1) / group;
    require(out.groups == 1 || (group % kColumns == 0 && out.n_segments == 1), "packed: groups are whole tiles of one segment");
    out.group_tiles = out.groups == 1 ? out.tiles : group / kColumns;
    out.chunk_tiles = kChunkTiles;
    while (out.groups > 1 && out.group_tiles % out.chunk_tiles) --out.chunk_tiles;
    for (size_t s = 0; s < out.n_segments; ++s) out.chunks += (out.segments[s].tiles + out.chunk_tiles - 1) / out.chunk_tiles;
    return out;
}

inline Matrix matrix_of(const Arrays& a) {
    Matrix out = geometry_of(a.layout, a.n_layout);
    require(a.n_codes == out.blocks * out.block_nbytes, "packed: codes of another size than the layout's");
    require(a.scales_nbytes == out.blocks * out.groups * kRows * (a.half ? 2 : 4), "packed: scales of another size than the layout's");
    out.codes = a.codes, out.scales = a.scales, out.scale_type = a.half ? Float::f16 : Float::f32;
    if (a.n_order) {
        require(a.n_order == out.n && out.groups == 1, "packed: an order has a place for each column, and one group");
        std::vector<bool> seen(out.n);
        for (size_t j = 0; j < out.n; ++j) {
            require(a.order[j] >= 0 && size_t(a.order[j]) < out.n && !seen[size_t(a.order[j])], "packed: the order is no permutation");
            seen[size_t(a.order[j])] = true;
        }
        out.order = a.order;
    }
    if (a.n_steps) {
        require(a.n_steps == out.n, "packed: one step for each column");
        out.steps = a.steps;
    }
    if (a.n_corrections) {
        require(a.n_starts == out.blocks + 1 && out.groups == 1 && a.starts[0] == 0 && a.starts[out.blocks] == int64_t(a.n_corrections), "packed: corrections belong to blocks, and to one group");
        for (size_t b = 0; b < out.blocks; ++b) require(a.starts[b] <= a.starts[b + 1], "packed: corrections in disorder");
        for (size_t i = 0; i < a.n_corrections; ++i) require(a.corrections[i] >> kColumnShift < out.n, "packed: a correction beyond the last column");
        out.starts = a.starts, out.corrections = a.corrections;
    }
    return out;
}

// Memory of this thread that lasts from call to call.
inline uint8_t* scratch(size_t nbytes) {
    thread_local size_t size = 0;
    thread_local Aligned<uint8_t> memory(1);
    if (size < nbytes) memory = Aligned<uint8_t>(nbytes), size = nbytes;
    return memory.data();
}

constexpr size_t kSmall = size_t(1) << 16;  // weights that one thread multiplies before another is awake

// Contiguous runs of blocks, a few for each thread so that none waits long for the last.
template <class Work> void share_blocks(const Matrix& matrix, size_t work, unsigned threads, Work each) {
    if (work < kSmall) threads = 1;
    const size_t parts = threads < 2 ? 1 : std::min<size_t>(matrix.blocks, 4 * threads);
    pool::run(parts, threads, [&](size_t i) { each(matrix.blocks * i / parts, matrix.blocks * (i + 1) / parts); });
}

inline void matmul(const Matrix& matrix, const Reader& x, size_t batch, unsigned planes, const Writer& y, unsigned threads, Isa isa) {
    require(batch >= 1 && batch <= kMaxBatch, "packed: a batch has 1 to 16 rows");
    const Kernels& kernels = kernels_for(isa);
    const auto padded = [](size_t nbytes) { return (nbytes + kVector - 1) / kVector * kVector; };
    const size_t levels = padded(matrix.tiles * kColumns * batch * planes), sums = padded(matrix.chunks * batch * planes * 4);
    const size_t scales = padded(matrix.chunks * batch * 4), values = matrix.starts ? matrix.n * batch * 4 : 0;
    uint8_t* memory = scratch(levels + sums + scales + values);
    const Activations rounded{batch, planes, reinterpret_cast<int8_t*>(memory), reinterpret_cast<int32_t*>(memory + levels),
                              reinterpret_cast<float*>(memory + levels + sums), reinterpret_cast<float*>(memory + levels + sums + scales)};
    kernels.quantise(matrix, x, rounded);
    share_blocks(matrix, matrix.m * matrix.n * batch, threads, [&](size_t first, size_t last) { kernels.multiply(matrix, rounded, first, last, y); });
}

inline size_t width_of(Float type) { return type == Float::f32 ? 4 : 2; }

inline uint8_t* scratch_for_rows(const Matrix& matrix) { return scratch(matrix.tiles * kColumns * kRows + matrix.n * 4); }

// Rows first .. last - 1 into out (last - first, n).
inline void rows(const Matrix& matrix, size_t first, size_t last, const Writer& out, unsigned threads, Isa isa) {
    require(first <= last && last <= matrix.m, "packed: no such rows");
    if (first == last) return;
    const size_t pitch = matrix.n * width_of(out.type), from = first / kRows, blocks = (last - 1) / kRows + 1 - from;
    pool::run(blocks, threads, [&](size_t i) {
        uint8_t which[kRows];
        void* to[kRows];
        size_t count = 0;
        const size_t top = (from + i) * kRows;
        for (size_t row = std::max(top, first); row < std::min(top + kRows, last); ++row, ++count)
            which[count] = uint8_t(row - top), to[count] = static_cast<uint8_t*>(out.at) + (row - first) * pitch;
        kernels_for(isa).rows(matrix, from + i, which, count, to, out.type, scratch_for_rows(matrix));
    });
}

inline void gather(const Matrix& matrix, const int64_t* indices, size_t count, const Writer& out, unsigned threads, Isa isa) {
    for (size_t i = 0; i < count; ++i) require(indices[i] >= 0 && size_t(indices[i]) < matrix.m, "packed: no such row");
    pool::run(count, threads, [&](size_t i) {
        const size_t row = size_t(indices[i]);
        const uint8_t which = uint8_t(row % kRows);
        void* to = static_cast<uint8_t*>(out.at) + i * matrix.n * width_of(out.type);
        kernels_for(isa).rows(matrix, row / kRows, &which, 1, &to, out.type, scratch_for_rows(matrix));
    });
}

// Codes of a whole matrix, and its corrections block by block; false where they would take more
// than float32 does.
inline bool pack(const Matrix& matrix, const Levels& levels, uint8_t* codes, std::vector<int64_t>& starts, std::vector<uint32_t>& corrections, unsigned threads, Isa isa) {
    std::vector<std::vector<uint32_t>> found(matrix.blocks);
    std::atomic<bool> fits{true};
    pool::run(matrix.blocks, threads, [&](size_t block) {
        const size_t room = kRows * matrix.n;
        auto* words = reinterpret_cast<uint32_t*>(scratch(room * 4));
        const size_t count = fits ? kernels_for(isa).pack(matrix, levels, block, codes + block * matrix.block_nbytes, words, room) : 0;
        if (count == SIZE_MAX) fits = false;
        else found[block].assign(words, words + count);
    });
    starts.assign(1, 0);
    for (const auto& block : found) {
        corrections.insert(corrections.end(), block.begin(), block.end());
        starts.push_back(int64_t(corrections.size()));
    }
    return fits;
}

}  // namespace waterfill::packed
