// Packed integers times activations. Compiled once per instruction set; see dispatch.h.
#include "packed_activations.h"
#include "packed_codes.h"
#include "packed_rows.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace packed;

// Planes of a pass: as many sums as stay in registers.
#if defined(WATERFILL_ISA_avx512)
constexpr unsigned kLog2Planes = 3;
#elif defined(WATERFILL_ISA_avx2)
constexpr unsigned kLog2Planes = 2;
#else
constexpr unsigned kLog2Planes = 1;
#endif
constexpr size_t kPlanes = size_t(1) << kLog2Planes;
constexpr size_t kAhead = 16384;  // bytes that are asked for before they are needed
// Vectors of which one is asked for. Where they are used quickly one after the other the processor sees
// what comes next, and many requests of ours would hold up its own; not so where planes are used side
// by side, or each vector takes long. Measured; the difference is up to a third.
constexpr unsigned asked_of(unsigned bits, size_t planes) { return bits % 4 || bits < 4 * kParts || planes > 1 ? 1 : 4; }

// Outputs of a block of rows so far: for each token the group's sum, and that of the groups before.
struct Outputs {
    Lanes group[kMaxBatch], total[kMaxBatch];
};

// How far a block of rows has come.
struct Walk {
    const Matrix& matrix;
    const uint8_t* codes;
    const uint8_t* scale;  // of the group
    size_t tile, chunk;
    size_t left;  // tiles of the group

    Walk(const Matrix& of, size_t block) : matrix(of), codes(of.codes + block * of.block_nbytes), scale(static_cast<const uint8_t*>(of.scales) + block * of.groups * pitch()), tile(0), chunk(0), left(of.group_tiles) {}
    size_t pitch() const { return kRows * (matrix.scale_type == Float::f16 ? 2 : 4); }
    Lanes scales() const { return matrix.scale_type == Float::f16 ? Lanes::load_half(reinterpret_cast<const uint16_t*>(scale)) : Lanes::load(reinterpret_cast<const float*>(scale)); }

    void advance(const Walk& to) { codes = to.codes, scale = to.scale, tile = to.tile, chunk = to.chunk, left = to.left; }
    // Past a chunk; where its group ends, the group's sums are scaled and added.
    void pass(size_t tiles, unsigned bits, size_t tokens, Lanes* group, Lanes* total) {
        codes += tiles * bits * kVector, tile += tiles, ++chunk, left -= tiles;
        if (left && tile < matrix.tiles) return;
        const Lanes by = scales();
        for (size_t t = 0; t < tokens; ++t) total[t] = total[t] + group[t] * by, group[t] = Lanes::zero();
        if (tile < matrix.tiles) left = matrix.group_tiles, scale += pitch();
    }
};

template <unsigned Period, size_t T> inline void add_chunk(const Sum<Period> (&sums)[T][kParts], unsigned planes, const float* scales, Lanes* group) {
    if (planes == 1) {
        for (size_t t = 0; t < T; ++t) group[t] = group[t] + Lanes::of(sums[t]) * scales[t];
    } else if constexpr (T % 2 == 0) {
        for (size_t t = 0; t < T / 2; ++t) {
            Sum<Period> both[kParts];
            for (size_t part = 0; part < kParts; ++part) both[part] = sums[2 * t][part].scaled(kBase, sums[2 * t + 1][part]);
            group[t] = group[t] + Lanes::of(both) * scales[t];
        }
    }
}

// Levels of a chunk times T planes, without their zero point. Where they have more bits than their
// codes, these are looked up.
template <unsigned Bits, unsigned LevelBits, size_t T>
inline void multiply_chunk(const uint8_t* codes, size_t tiles, const Table& table, const int8_t* x, const int32_t* levels, Sum<flush_period(LevelBits)> (&out)[T][kParts]) {
    constexpr unsigned kPeriod = flush_period(LevelBits);
    constexpr unsigned kChains = kParts > 1 ? 1 : T == 1 ? 4 : T < 4 ? 2 : 1;  // so that a sum need not wait for the one before
    Sum<kPeriod> sums[kChains][T][kParts];
    for (unsigned c = 0; c < kChains; ++c)
        for (size_t t = 0; t < T; ++t)
            for (Sum<kPeriod>& sum : sums[c][t]) sum = c ? Sum<kPeriod>::zero() : Sum<kPeriod>::start(LevelBits, levels[t]);
    for (size_t i = 0; i < tiles; ++i, codes += Bits * kVector, x += kColumns * T) {
        for (unsigned v = 0; v < Bits; v += asked_of(Bits, T)) __builtin_prefetch(codes + kAhead + v * kVector, 0, 2);
        each_part([&](auto part) {
            const int8_t* here = x;
            asm volatile("" : "+r"(here));  // or what one part has loaded is kept for the next, in too few registers
            each_dword([&](auto d) {
                constexpr unsigned D = decltype(d)::value;
                Codes four = codes_of<Bits, D>(codes + part * kPart);
                if constexpr (Bits != LevelBits) four = table[four];
                for (size_t t = 0; t < T; ++t) sums[D % kChains][t][part].template add<D>(four, here + 4 * (D * T + t));
            });
        });
    }
    for (size_t t = 0; t < T; ++t)
        for (size_t part = 0; part < kParts; ++part) {
            out[t][part] = sums[0][t][part];
            for (unsigned c = 1; c < kChains; ++c) out[t][part] = out[t][part] + sums[c][t][part];
        }
}

// A segment for the tokens of one pass.
template <unsigned Bits, unsigned LevelBits, size_t T> void multiply_segment(const Segment& segment, Walk& at, const Pass& pass, unsigned planes, Lanes* groups, Lanes* totals) {
    const size_t tokens = T / planes, chunk_tiles = at.matrix.chunk_tiles, end = segment.first + segment.tiles;
    Walk walk = at;
    Table table{};
    if constexpr (Bits != LevelBits) table = Table::of(at.matrix.table);
    Lanes group[T], total[T];
    for (size_t t = 0; t < tokens; ++t) group[t] = groups[t], total[t] = totals[t];
    while (walk.tile < end) {
        const size_t tiles = std::min(chunk_tiles, end - walk.tile);
        Sum<flush_period(LevelBits)> sums[T][kParts];
        multiply_chunk<Bits, LevelBits, T>(walk.codes, tiles, table, pass.levels + walk.tile * kColumns * T, pass.sums + walk.chunk * T, sums);
        add_chunk<flush_period(LevelBits), T>(sums, planes, pass.scales + walk.chunk * tokens, group);
        walk.pass(tiles, Bits, tokens, group, total);
    }
    for (size_t t = 0; t < tokens; ++t) groups[t] = group[t], totals[t] = total[t];
    at.advance(walk);
}

using Multiply = void (*)(const Segment&, Walk&, const Pass&, unsigned, Lanes*, Lanes*);
template <unsigned Bits, unsigned LevelBits, size_t... I> Multiply for_planes(unsigned log2, std::index_sequence<I...>) {
    static constexpr Multiply table[] = {multiply_segment<Bits, LevelBits, size_t(1) << I>...};
    return table[log2];
}
template <unsigned... I> Multiply for_bits(unsigned bits, bool tabled, size_t planes, std::integer_sequence<unsigned, I...>) {
    using Sizes = std::make_index_sequence<kLog2Planes + 1>;
    static constexpr Multiply (*table[])(unsigned, Sizes) = {for_planes<I + 2, I + 2>...};
    unsigned log2 = 0;
    while (planes >> (log2 + 1)) ++log2;
    return tabled ? for_planes<4, 8>(log2, Sizes()) : table[bits - 2](log2, {});
}

// What levels beyond their width lack; a matrix with such has one group.
template <bool One> void correct(const Walk& walk, size_t block, const Activations& x, Lanes* total) {
    const Matrix& matrix = walk.matrix;
    const size_t batch = One ? 1 : x.batch;
    alignas(64) float sums[kRows][One ? 1 : kMaxBatch] = {};
    const uint32_t* const end = matrix.corrections + matrix.starts[block + 1];
    for (const uint32_t* word = matrix.corrections + matrix.starts[block]; word < end; ++word) {
        const float difference = float(difference_of(*word));
        const float* values = x.values + (*word >> kColumnShift) * batch;
        for (size_t t = 0; t < batch; ++t) sums[row_of(*word)][t] += difference * values[t];
    }
    const Lanes scales = walk.scales();
    for (size_t t = 0; t < batch; ++t) {
        alignas(64) float line[kRows];
        for (size_t r = 0; r < kRows; ++r) line[r] = sums[r][t];
        total[t] = total[t] + Lanes::load(line) * scales;
    }
}

template <Float Type> void write_as(const Matrix& matrix, size_t block, size_t batch, const Lanes* total, void* y) {
    using Kind = Stored<Type>;
    const size_t row = block * kRows, rows = std::min(kRows, matrix.m - row);
    for (size_t t = 0; t < batch; ++t) {
        alignas(64) float line[kRows];
        total[t].store(line);
        auto* out = static_cast<typename Kind::type*>(y) + t * matrix.m + row;
        for (size_t r = 0; r < rows; ++r) out[r] = Kind::write(line[r]);
    }
}

void multiply(const Matrix& matrix, const Activations& x, size_t first, size_t last, const Writer& y) {
    Pass passes[kMaxBatch];
    const size_t n_passes = passes_of(matrix, x, kPlanes, passes);
    for (size_t block = first; block < last; ++block) {
        Outputs out;
        std::fill_n(out.group, x.batch, Lanes::zero()), std::fill_n(out.total, x.batch, Lanes::zero());
        Walk walk(matrix, block);
        for (size_t s = 0; s < matrix.n_segments; ++s) {
            const Segment& segment = matrix.segments[s];
            const Walk before = walk;
            for (size_t p = 0; p < n_passes; ++p) {
                const Pass& pass = passes[p];
                walk.advance(before);
                for_bits(segment.bits, matrix.table, pass.tokens * x.planes, std::make_integer_sequence<unsigned, 7>())(segment, walk, pass, x.planes, out.group + pass.first, out.total + pass.first);
            }
        }
        if (matrix.starts) (x.batch == 1 ? correct<true> : correct<false>)(walk, block, x, out.total);
        if (y.type == Float::f32) write_as<Float::f32>(matrix, block, x.batch, out.total, y.at);
        else if (y.type == Float::bf16) write_as<Float::bf16>(matrix, block, x.batch, out.total, y.at);
        else write_as<Float::f16>(matrix, block, x.batch, out.total, y.at);
    }
}

void quantise(const Matrix& matrix, const Reader& x, const Activations& out) {
    if (x.type == Float::f32) quantise_as<Float::f32>(matrix, x.at, out, kPlanes);
    else if (x.type == Float::bf16) quantise_as<Float::bf16>(matrix, x.at, out, kPlanes);
    else quantise_as<Float::f16>(matrix, x.at, out, kPlanes);
}

uint64_t read(const uint8_t* bytes, size_t count) {
    constexpr size_t kStep = 4 * kPart;
    const uint8_t zeros[kPart] = {};
    Codes sums[4] = {Codes::load(zeros), Codes::load(zeros), Codes::load(zeros), Codes::load(zeros)};
    size_t i = 0;
    for (; i + kStep <= count; i += kStep)
        for (size_t k = 0; k < 4; ++k) sums[k] = sums[k] | Codes::load(bytes + i + k * kPart);
    uint8_t last[kPart];
    (sums[0] | sums[1] | sums[2] | sums[3]).store(last);
    uint64_t all = 0;
    for (uint8_t byte : last) all |= byte;
    for (; i < count; ++i) all |= bytes[i];
    return all;
}

const Kernels kTable{quantise, multiply, rows, pack, read};

}  // namespace

const packed::Kernels& packed_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
