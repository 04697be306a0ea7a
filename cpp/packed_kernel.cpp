// Packed integers times activations. Compiled once per instruction set; see dispatch.h.
#include "packed_activations.h"
#include "packed_codes.h"
#include "packed_rows.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace packed;

#if defined(WATERFILL_ISA_avx512)
constexpr size_t kPlanes = 8;  // of a pass: sums that stay in registers
constexpr unsigned kChains = 2;  // of one sum, so that an addition need not wait for the one before
#elif defined(WATERFILL_ISA_avx2)
constexpr size_t kPlanes = 4;
constexpr unsigned kChains = 1;
#else
constexpr size_t kPlanes = 2;
constexpr unsigned kChains = 1;
#endif
constexpr size_t kAhead = 2048;  // bytes that are asked for before they are needed

// Outputs of a block of rows so far: for each token the group's sum, and that of the groups before.
struct Outputs {
    Lanes group[kMaxBatch], total[kMaxBatch];
};

// Where a block's work stands: the first tile of the next chunk, and what belongs to it.
struct Place {
    const Matrix& matrix;
    size_t block, chunk, tile;

    Lanes scale() const {
        const size_t at = (block * matrix.groups + tile / matrix.group_tiles) * kRows;
        return matrix.scale_type == Float::f16 ? Lanes::load_half(static_cast<const uint16_t*>(matrix.scales) + at) : Lanes::load(static_cast<const float*>(matrix.scales) + at);
    }
    bool ends_group(size_t tiles) const { return tile + tiles == matrix.tiles || (matrix.groups > 1 && (tile + tiles) % matrix.group_tiles == 0); }
};

template <unsigned Period, size_t T> inline void add_chunk(const Sum<Period> (&sums)[T], unsigned planes, const float* scales, Lanes* group) {
    if (planes == 1) {
        for (size_t t = 0; t < T; ++t) group[t] = group[t] + Lanes::of(sums[t]) * scales[t];
    } else if constexpr (T % 2 == 0) {
        for (size_t t = 0; t < T / 2; ++t) group[t] = group[t] + Lanes::of(sums[2 * t].scaled(kBase, sums[2 * t + 1])) * scales[t];
    }
}

inline void end_group(const Place& place, size_t tokens, Lanes* group, Lanes* total) {
    const Lanes scale = place.scale();
    for (size_t t = 0; t < tokens; ++t) total[t] = total[t] + group[t] * scale, group[t] = Lanes::zero();
}

// A segment for so few planes that codes are used as they come.
template <unsigned Bits, size_t T> void few(const Segment& segment, Place place, const Pass& pass, unsigned planes, Outputs& out) {
    constexpr unsigned kPeriod = flush_period(Bits);
    const Matrix& matrix = place.matrix;
    const size_t tokens = T / planes;
    const uint8_t* codes = matrix.codes + place.block * matrix.block_nbytes + segment.offset;
    const int8_t* x = pass.levels + segment.first * 32 * T;
    Lanes group[T], total[T];
    for (size_t t = 0; t < tokens; ++t) group[t] = out.group[t], total[t] = out.total[t];
    const size_t last = segment.first + segment.tiles;
    for (place.tile = segment.first; place.tile < last; ++place.chunk) {
        const size_t tiles = std::min(matrix.chunk_tiles, last - place.tile);
        Sum<kPeriod> sums[kChains * T];
        for (size_t t = 0; t < kChains * T; ++t) sums[t] = t < T ? Sum<kPeriod>::start(Bits, pass.sums[place.chunk * T + t]) : Sum<kPeriod>::zero();
        for (size_t i = 0; i < tiles; ++i, codes += Bits * kVector, x += 32 * T) {
            for (unsigned v = 0; v < Bits; ++v) __builtin_prefetch(codes + kAhead + v * kVector);
            each_dword([&](auto d) {
                constexpr unsigned D = decltype(d)::value;
                const Codes four = codes_of<Bits, D>(codes);
                for (size_t t = 0; t < T; ++t) sums[D % kChains * T + t].template add<D>(four, x + 4 * (D * T + t));
            });
        }
        Sum<kPeriod> whole[T];
        for (size_t t = 0; t < T; ++t) whole[t] = kChains == 1 ? sums[t] : sums[t] + sums[T * (kChains - 1) + t];
        add_chunk<kPeriod, T>(whole, planes, pass.scales + place.chunk * tokens, group);
        if (place.ends_group(tiles)) end_group(place, tokens, group, total);
        place.tile += tiles;
    }
    for (size_t t = 0; t < tokens; ++t) out.group[t] = group[t], out.total[t] = total[t];
}

// A chunk unpacked to bytes, for the planes of one pass.
template <unsigned Period, size_t T> void many(const uint8_t* codes, size_t tiles, unsigned bits, const int8_t* x, const int32_t* start, const float* scales, unsigned planes, Lanes* group) {
    Sum<Period> sums[T];
    for (size_t t = 0; t < T; ++t) sums[t] = Sum<Period>::start(bits, start[t]);
    for (size_t i = 0; i < tiles; ++i, codes += 8 * kVector, x += 32 * T)
        each_dword([&](auto d) {
            constexpr unsigned D = decltype(d)::value;
            const Codes four = Codes::load(codes + kVector * D);
            for (size_t t = 0; t < T; ++t) sums[t].template add<D>(four, x + 4 * (D * T + t));
        });
    add_chunk<Period, T>(sums, planes, scales, group);
}

using Few = void (*)(const Segment&, Place, const Pass&, unsigned, Outputs&);
template <unsigned Bits> constexpr Few few_of(size_t planes) { return planes == 1 ? few<Bits, 1> : few<Bits, 2>; }
Few few_for(unsigned bits, size_t planes) {
    switch (bits) {
        case 2: return few_of<2>(planes);
        case 3: return few_of<3>(planes);
        case 4: return few_of<4>(planes);
        case 5: return few_of<5>(planes);
        case 6: return few_of<6>(planes);
        case 7: return few_of<7>(planes);
        default: return few_of<8>(planes);
    }
}

using Many = void (*)(const uint8_t*, size_t, unsigned, const int8_t*, const int32_t*, const float*, unsigned, Lanes*);
template <unsigned Period, size_t... T> Many many_of(size_t planes, std::index_sequence<T...>) {
    static constexpr Many table[] = {many<Period, T + 1>...};
    return table[planes - 1];
}
Many many_for(unsigned bits, size_t planes) {
    constexpr auto all = std::make_index_sequence<kPlanes>();
    const unsigned period = flush_period(bits);
    if (period == flush_period(5)) return many_of<flush_period(5)>(planes, all);
    if (period == flush_period(6)) return many_of<flush_period(6)>(planes, all);
    if (period == flush_period(7)) return many_of<flush_period(7)>(planes, all);
    if (period == flush_period(8)) return many_of<flush_period(8)>(planes, all);
    return many_of<flush_period(4)>(planes, all);
}

void segment_many(const Segment& segment, Place place, const Activations& x, size_t passes, Outputs& out) {
    const Matrix& matrix = place.matrix;
    alignas(64) uint8_t unpacked[kChunkTiles * 8 * kVector];
    const uint8_t* codes = matrix.codes + place.block * matrix.block_nbytes + segment.offset;
    const size_t last = segment.first + segment.tiles;
    for (place.tile = segment.first; place.tile < last; ++place.chunk) {
        const size_t tiles = std::min(matrix.chunk_tiles, last - place.tile);
        kUnpack[segment.bits](codes, tiles, unpacked);
        for (size_t p = 0; p < passes; ++p) {
            const Pass pass = pass_of(matrix, x, passes, p);
            const size_t planes = pass.tokens * x.planes;
            many_for(segment.bits, planes)(unpacked, tiles, segment.bits, pass.levels + place.tile * 32 * planes, pass.sums + place.chunk * planes,
                                           pass.scales + place.chunk * pass.tokens, x.planes, out.group + pass.first);
        }
        if (place.ends_group(tiles)) end_group(place, x.batch, out.group, out.total);
        codes += tiles * segment.bits * kVector;
        place.tile += tiles;
    }
}

// What levels beyond their width lack; a matrix with such has one group.
void correct(const Place& place, const Activations& x, Lanes* total) {
    const Matrix& matrix = place.matrix;
    alignas(64) float sums[kMaxBatch][kRows] = {};
    for (int64_t i = matrix.starts[place.block]; i < matrix.starts[place.block + 1]; ++i) {
        const uint32_t word = matrix.corrections[i];
        const float difference = float(difference_of(word));
        const float* values = x.values + (word >> kColumnShift) * x.batch;
        for (size_t t = 0; t < x.batch; ++t) sums[t][row_of(word)] += difference * values[t];
    }
    const Lanes scale = place.scale();
    for (size_t t = 0; t < x.batch; ++t) total[t] = total[t] + Lanes::load(sums[t]) * scale;
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
    const size_t planes = x.batch * x.planes, passes = passes_of(x, kPlanes);
    const Pass only = pass_of(matrix, x, passes, 0);
    for (size_t block = first; block < last; ++block) {
        Outputs out;
        std::fill_n(out.group, x.batch, Lanes::zero()), std::fill_n(out.total, x.batch, Lanes::zero());
        Place place{matrix, block, 0, 0};
        for (size_t s = 0; s < matrix.n_segments; ++s) {
            const Segment& segment = matrix.segments[s];
            if (planes <= 2) few_for(segment.bits, planes)(segment, place, only, x.planes, out);
            else segment_many(segment, place, x, passes, out);
            place.chunk += (segment.tiles + matrix.chunk_tiles - 1) / matrix.chunk_tiles;
        }
        if (matrix.starts) correct(place, x, out.total);
        if (y.type == Float::f32) write_as<Float::f32>(matrix, block, x.batch, out.total, y.at);
        else if (y.type == Float::bf16) write_as<Float::bf16>(matrix, block, x.batch, out.total, y.at);
        else write_as<Float::f16>(matrix, block, x.batch, out.total, y.at);
    }
}

void quantise(const Matrix& matrix, const Reader& x, const Activations& out) {
    const size_t passes = passes_of(out, kPlanes);
    if (x.type == Float::f32) quantise_as<Float::f32>(matrix, x.at, out, passes);
    else if (x.type == Float::bf16) quantise_as<Float::bf16>(matrix, x.at, out, passes);
    else quantise_as<Float::f16>(matrix, x.at, out, passes);
}

uint64_t read(const uint8_t* bytes, size_t count) {
    constexpr size_t kStep = 4 * kVector;
    Codes sums[4];
    const uint8_t zeros[kVector] = {};
    for (Codes& sum : sums) sum = Codes::load(zeros);
    size_t i = 0;
    for (; i + kStep <= count; i += kStep)
        for (size_t k = 0; k < 4; ++k) {
            __builtin_prefetch(bytes + i + kAhead + k * kVector);
            sums[k] = sums[k] | Codes::load(bytes + i + k * kVector);
        }
    uint8_t last[kVector];
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
