// Checks shapes and ranges, picks the instruction set, releases the GIL and shares blocks.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <optional>

#include "paths_stream.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

template <class T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <class T> using Vector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

const TrellisCode& code_of(unsigned states) {
    for (const TrellisCode& code : kTrellisCodes)
        if (code.states == states) return code;
    throw std::invalid_argument("states must be 1, or a power of two from 4 to 256");
}

size_t highest(const Vector<const uint8_t>& levels) {
    return levels.shape(0) ? *std::max_element(levels.data(), levels.data() + levels.shape(0)) : 0;
}

paths::Header header_of(const Vector<const uint8_t>& columns, const Vector<const uint8_t>& rows, const Matrix<const uint16_t>& freqs,
                        int widening, unsigned precision, unsigned states, size_t segment) {
    const size_t levels = freqs.shape(0) / 2;
    require(levels > highest(columns) + highest(rows) && levels <= 128, "paths: models for each level, at most 128");
    require(freqs.shape(0) == 2 * levels && freqs.shape(1) == paths::kSymbols, "paths: two tables of 16 symbols for each level");
    require(precision < 8 && std::abs(widening) < 4096 && (int(levels) + widening) >> precision < 16, "paths: shifts are below 16");
    require(segment > 0, "paths: segments of a row at least");
    rans::check({freqs.data(), 2 * levels, paths::kSymbols});
    return {rows.shape(0), columns.shape(0), {columns.data(), rows.data(), widening, precision, code_of(states), segment}, {freqs.data(), levels}};
}

std::pair<nb::bytes, nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>> encode(
    const Matrix<const int32_t>& index, const Vector<const uint8_t>& columns, const Vector<const uint8_t>& rows,
    const Matrix<const uint16_t>& freqs, int widening, unsigned precision, unsigned states, size_t segment, unsigned lanes, unsigned threads) {
    const paths::Header header = header_of(columns, rows, freqs, widening, precision, states, segment);
    require(header.n == index.shape(1) && header.m == index.shape(0), "paths: a level for each row and column");
    for (size_t i = 0; i < header.frequencies.levels; ++i)
        for (unsigned grid = 0; grid < 2; ++grid)
            require(header.frequencies.of(i, grid)[14] && header.frequencies.of(i, grid)[15], "paths: escapes have no frequency");
    const Isa isa = chosen_isa();
    auto* found = new std::vector<int64_t>();
    const nb::capsule owner(found, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
    std::string out;
    {
        nb::gil_scoped_release release;
        out = paths::encode(header, index.data(), lanes, threads, isa, *found);
    }
    return {nb::bytes(out.data(), out.size()), nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>(found->data(), {found->size()}, owner)};
}

void decode(const Vector<const uint8_t>& data, const Vector<const uint8_t>& columns, const Vector<const uint8_t>& rows,
            const Matrix<const uint16_t>& freqs, int widening, unsigned precision, const Vector<const float>& step,
            const Vector<const float>& scale, const std::optional<Matrix<float>>& out, const std::optional<Matrix<uint16_t>>& out_bf16,
            unsigned states, size_t segment, unsigned threads) {
    const paths::Header header = header_of(columns, rows, freqs, widening, precision, states, segment);
    const size_t m = header.m, n = header.n;
    require(out.has_value() != out_bf16.has_value(), "paths: one of the two outputs");
    require(out ? out->shape(0) == m && out->shape(1) == n : out_bf16->shape(0) == m && out_bf16->shape(1) == n, "paths: shapes differ");
    require(step.shape(0) == n && scale.shape(0) == m, "paths: a step for each column, a scale for each row");
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    paths::decode(header, data.data(), data.shape(0), step.data(), scale.data(), {out ? out->data() : nullptr, out_bf16 ? out_bf16->data() : nullptr},
                  threads, isa);
}

// Places of the NaNs that stand for escaped indices. Groups are looked at as a whole first: they
// are rare.
template <class T> __attribute__((optimize("O3"))) void find_nans(const T* values, size_t count, T nan, std::vector<int64_t>& found) {
    constexpr size_t kGroup = 256;
    for (size_t first = 0; first < count; first += kGroup) {
        const size_t end = std::min(count, first + kGroup);
        unsigned any = 0;
        for (size_t i = first; i < end; ++i) any |= unsigned(T(values[i] | 1) == nan);
        if (!any) continue;
        for (size_t i = first; i < end; ++i)
            if (T(values[i] | 1) == nan) found.push_back(int64_t(i));
    }
}

nb::ndarray<nb::numpy, int64_t, nb::ndim<1>> escapes(const std::optional<Matrix<const uint32_t>>& values, const std::optional<Matrix<const uint16_t>>& halves) {
    require(values.has_value() != halves.has_value(), "paths: one of the two");
    auto* found = new std::vector<int64_t>();
    const nb::capsule owner(found, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
    {
        nb::gil_scoped_release release;
        if (values) find_nans<uint32_t>(values->data(), values->size(), 0x7FC00001u, *found);
        else find_nans<uint16_t>(halves->data(), halves->size(), 0x7FC1, *found);
    }
    return {found->data(), {found->size()}, owner};
}

void tally(const Matrix<const int32_t>& index, const Vector<const uint8_t>& columns, const Vector<const uint8_t>& rows, unsigned states,
           size_t segment, unsigned reach, bool by_row, const Matrix<uint32_t>& counts) {
    require(segment > 0 && reach > 0 && reach < 1u << 16, "paths: a segment, and a reach");
    const size_t m = index.shape(0), n = index.shape(1), each = 2 * (size_t(reach) + 1), levels = counts.shape(1) / each;
    require(columns.shape(0) == n && rows.shape(0) == m, "paths: a level for each row and column");
    require(counts.shape(0) == (by_row ? m : n) && counts.shape(1) == levels * each && (by_row ? highest(columns) : highest(rows)) < levels,
            "paths: counts of another shape");
    const TrellisCode code = code_of(states);
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    std::vector<int32_t> machine(n);
    paths::kernels_for(isa).tally({columns.data(), rows.data(), code, segment, reach, index.data(), m, n, unsigned(levels), by_row, machine.data(), counts.data()});
}

}  // namespace

void bind_paths(nb::module_& m) {
    m.def("paths_encode", &encode, "index"_a.noconvert(), "columns"_a.noconvert(), "rows"_a.noconvert(), "freqs"_a.noconvert(),
          "widening"_a, "precision"_a, "states"_a, "segment"_a, "lanes"_a, "threads"_a, "A rANS stream of trellis indices, and the places of those it escapes.");
    m.def("paths_decode", &decode, "data"_a.noconvert(), "columns"_a.noconvert(), "rows"_a.noconvert(), "freqs"_a.noconvert(),
          "widening"_a, "precision"_a, "step"_a.noconvert(), "scale"_a.noconvert(), "out"_a.noconvert().none(), "out_bf16"_a.noconvert().none(),
          "states"_a, "segment"_a, "threads"_a, "Weights of a rANS stream of trellis indices; RuntimeError on bytes that lie.");
    m.def("paths_escapes", &escapes, "values"_a.noconvert().none(), "halves"_a.noconvert().none(), "Places of escaped indices in decoded bits.");
    m.def("paths_tally", &tally, "index"_a.noconvert(), "columns"_a.noconvert(), "rows"_a.noconvert(), "states"_a, "segment"_a, "reach"_a,
          "by_row"_a, "counts"_a.noconvert(), "Add occurrences of |k| by column or row, the other's level and the grid.");
}
