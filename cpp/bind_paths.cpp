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

struct Call {
    paths::Model model;
    size_t contexts;

    Call(const Vector<const uint8_t>& columns, const Vector<const uint8_t>& rows, unsigned states, size_t segment, unsigned reach)
        : model{columns.data(), rows.data(), code_of(states), segment, reach}, contexts(2 * (highest(columns) + highest(rows) + 1)) {
        require(contexts <= 256, "paths: at most 128 levels");
        require(segment > 0 && reach > 0 && reach <= 126, "paths: a segment, and a reach of 1 to 126");
    }
    void require_tables(const Matrix<const uint16_t>& freqs) const {
        require(freqs.shape(0) >= contexts && freqs.shape(1) == 2 * size_t(model.reach) + 3, "paths: a table for each context");
    }
};

std::pair<nb::bytes, nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>> encode(
    const Matrix<const int32_t>& index, const Vector<const uint8_t>& columns, const Vector<const uint8_t>& rows,
    const Matrix<const uint16_t>& freqs, unsigned states, size_t segment, unsigned reach, unsigned lanes, unsigned threads) {
    const Call call(columns, rows, states, segment, reach);
    call.require_tables(freqs);
    const size_t m = index.shape(0), n = index.shape(1);
    require(columns.shape(0) == n && rows.shape(0) == m, "paths: a level for each row and column");
    const Isa isa = chosen_isa();
    auto* found = new std::vector<int64_t>();
    const nb::capsule owner(found, [](void* p) noexcept { delete static_cast<std::vector<int64_t>*>(p); });
    std::string out;
    {
        nb::gil_scoped_release release;
        std::vector<uint8_t> contexts(m * n), symbols(m * n), escaped(m * n);
        const size_t parts = segment ? (m + segment - 1) / segment : 0;
        rans::in_parallel(parts, threads, [&](size_t part) {
            const size_t first = part * segment, count = std::min(segment, m - first), at = first * n;
            paths::Model model = call.model;
            model.rows += first;
            paths::kernels_for(isa).contexts({&model, freqs.data(), index.data() + at, count, n, contexts.data() + at, symbols.data() + at, escaped.data() + at});
        });
        for (const uint8_t *first = escaped.data(), *end = first + escaped.size(), *at = first; at < end; ++at) {
            at = static_cast<const uint8_t*>(std::memchr(at, 1, size_t(end - at)));
            if (!at) break;
            found->push_back(at - first);
        }
        out = rans::encode({symbols.data(), m, n, nullptr, contexts.data()}, {freqs.data(), freqs.shape(0), freqs.shape(1)}, lanes, segment, threads, isa);
    }
    return {nb::bytes(out.data(), out.size()), nb::ndarray<nb::numpy, int64_t, nb::ndim<1>>(found->data(), {found->size()}, owner)};
}

void decode(const Vector<const uint8_t>& data, const Vector<const uint8_t>& columns, const Vector<const uint8_t>& rows,
            const Matrix<const uint16_t>& freqs, const Vector<const float>& step, const Vector<const float>& scale,
            const std::optional<Matrix<float>>& out, const std::optional<Matrix<uint16_t>>& out_bf16, unsigned states,
            size_t segment, unsigned reach, unsigned threads) {
    const Call call(columns, rows, states, segment, reach);
    call.require_tables(freqs);
    const size_t m = rows.shape(0), n = columns.shape(0);
    require(out.has_value() != out_bf16.has_value(), "paths: one of the two outputs");
    require(out ? out->shape(0) == m && out->shape(1) == n : out_bf16->shape(0) == m && out_bf16->shape(1) == n, "paths: shapes differ");
    require(step.shape(0) == n && scale.shape(0) == m, "paths: a step for each column, a scale for each row");
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    paths::decode(data.data(), data.shape(0), call.model, {freqs.data(), freqs.shape(0), freqs.shape(1)}, step.data(), scale.data(),
                  {m, n, out ? out->data() : nullptr, out_bf16 ? out_bf16->data() : nullptr}, threads, isa);
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
    const Call call(columns, rows, states, segment, reach);
    const size_t m = index.shape(0), n = index.shape(1), each = 2 * (size_t(reach) + 1), levels = counts.shape(1) / each;
    require(columns.shape(0) == n && rows.shape(0) == m, "paths: a level for each row and column");
    require(counts.shape(0) == (by_row ? m : n) && counts.shape(1) == levels * each && (by_row ? highest(columns) : highest(rows)) < levels,
            "paths: counts of another shape");
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    paths::kernels_for(isa).tally({&call.model, index.data(), m, n, unsigned(levels), by_row, counts.data()});
}

}  // namespace

void bind_paths(nb::module_& m) {
    m.def("paths_encode", &encode, "index"_a.noconvert(), "columns"_a.noconvert(), "rows"_a.noconvert(), "freqs"_a.noconvert(), "states"_a,
          "segment"_a, "reach"_a, "lanes"_a, "threads"_a, "A rANS stream of trellis indices, and the places of those it escapes.");
    m.def("paths_decode", &decode, "data"_a.noconvert(), "columns"_a.noconvert(), "rows"_a.noconvert(), "freqs"_a.noconvert(),
          "step"_a.noconvert(), "scale"_a.noconvert(), "out"_a.noconvert().none(), "out_bf16"_a.noconvert().none(), "states"_a, "segment"_a,
          "reach"_a, "threads"_a, "Weights of a rANS stream of trellis indices; RuntimeError on bytes that lie.");
    m.def("paths_escapes", &escapes, "values"_a.noconvert().none(), "halves"_a.noconvert().none(), "Places of escaped indices in decoded bits.");
    m.def("paths_tally", &tally, "index"_a.noconvert(), "columns"_a.noconvert(), "rows"_a.noconvert(), "states"_a, "segment"_a, "reach"_a,
          "by_row"_a, "counts"_a.noconvert(), "Add occurrences of |k| by column or row, the other's level and the grid.");
}
