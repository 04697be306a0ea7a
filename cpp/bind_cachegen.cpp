// Checks shapes and indices, picks the instruction set, releases the GIL; one thread.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <algorithm>
#include <utility>

#include "bind_cachegen.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

using namespace cachegen;

void read_rows(const Words& words, const char* dtype, const Places& first, const Places& second, const Angles& cos, const Angles& sin, const Cube<float>& out) {
    const Rows rows(words, dtype, out.shape(0), out.shape(1), out.shape(2), cos, sin, first.shape(0));
    const auto pairs = pairs_of(first, second, rows.width);
    const auto run = kernels().read;
    nb::gil_scoped_release release;
    rows.each(words, [&](const char* at, size_t to, size_t, const float* c, const float* s) { run(at, rows.format, rows.width, pairs, c, s, out.data() + to); });
}

std::pair<Owned<int64_t>, Owned<int32_t>> quantise(
    const Cube<const float>& z, const Vector<const float>& offset, float inverse, const Vector<const uint8_t>& shift, const Places& first, const Places& last,
    const Places& column, const Places& wide, const Places& low_column, size_t together, const Matrix<uint8_t>& out) {
    const size_t rows = z.shape(2), components = z.shape(0) * z.shape(1);
    require(out.shape(0) == rows && offset.shape(0) == components && shift.shape(0) == components && first.shape(0) == components && last.shape(0) == components, "cachegen: shapes that do not fit each other");
    const Columns c(column, wide, low_column, components, out.shape(1), together, rows);
    const auto lows = c.lows(components);
    std::vector<int32_t> high(rows);
    std::vector<int64_t> places;
    std::vector<int32_t> over;
    const auto run = kernels().quantise;
    bool far = false;
    {
        nb::gil_scoped_release release;
        for (size_t j = 0; j < components; ++j) {
            require(shift.data()[j] < 8, "cachegen: a shift of too many bits");
            const cachegen::Component one{offset.data()[j], shift.data()[j], first.data()[j], last.data()[j], 0.0f, together, together * c.columns};
            uint8_t* low = lows[j] < 0 ? nullptr : out.data() + c.at(lows[j]);
            const int flags = run(z.data() + j * rows, rows, one, inverse, high.data(), out.data() + c.at(c.column[j]), low);
            far |= flags >> 1;
            if (flags & 1)
                for (size_t r = 0; r < rows; ++r) {
                    const int32_t near = std::min(std::max(high[r], one.first), one.last);
                    if (high[r] != near) places.push_back(int64_t(r * components + j)), over.push_back(high[r] - near);
                }
        }
    }
    if (far) throw std::runtime_error("numbers that are not finite, or too large for this level");
    return {owned(std::move(places)), owned(std::move(over))};
}

void dequantise(const Matrix<const uint8_t>& symbols, float step, const Vector<const uint8_t>& shift, const Vector<const float>& pull, const Places& column, const Places& wide, const Places& low_column, const Vector<const int64_t>& places, const Vector<const int32_t>& over, size_t together, const Cube<float>& out) {
    const size_t rows = out.shape(2), components = out.shape(0) * out.shape(1);
    require(symbols.shape(0) == rows && shift.shape(0) == components && pull.shape(0) == components && places.shape(0) == over.shape(0), "cachegen: shapes that do not fit each other");
    const Columns c(column, wide, low_column, components, symbols.shape(1), together, rows);
    const auto lows = c.lows(components);
    for (size_t i = 0; i < places.shape(0); ++i) require(places.data()[i] >= 0 && size_t(places.data()[i]) < rows * components, "cachegen: a place beyond the others");
    for (size_t j = 0; j < components; ++j) require(shift.data()[j] < 8, "cachegen: a shift of too many bits");
    const auto run = kernels().dequantise;
    nb::gil_scoped_release release;
    for (size_t j = 0; j < components; ++j) {
        const cachegen::Component one{0.0f, shift.data()[j], 0, 0, pull.data()[j], together, together * c.columns};
        const uint8_t* low = lows[j] < 0 ? nullptr : symbols.data() + c.at(lows[j]);
        run(symbols.data() + c.at(c.column[j]), low, rows, one, step, out.data() + j * rows);
    }
    // What had no symbol of its own, once more from its nearest.
    for (size_t i = 0; i < places.shape(0); ++i) {
        const size_t r = size_t(places.data()[i]) / components, j = size_t(places.data()[i]) % components;
        const size_t group = r / together * together * c.columns + r % together;
        const float scale = float(1 << shift.data()[j]);
        float k = float(int64_t(symbols.data()[group + c.at(c.column[j])]) - cachegen::kMiddle + over.data()[i]) * scale;
        if (lows[j] >= 0) k = k - 0.5f * scale + float(symbols.data()[group + c.at(lows[j])]);
        const float moved = k > 0 ? k - pull.data()[j] : k < 0 ? k + pull.data()[j] : k;
        out.data()[j * rows + r] = moved * step;
    }
}

}  // namespace

void bind_cachegen(nb::module_& m) {
    m.def("cachegen_read", &read_rows, "words"_a, "dtype"_a, "first"_a.noconvert(), "second"_a.noconvert(), "cos"_a.none().noconvert(), "sin"_a.none().noconvert(), "out"_a.noconvert(), "Rows of keys or values to floats, turned.");
    m.def("cachegen_quantise", &quantise, "z"_a.noconvert(), "offset"_a.noconvert(), "inverse"_a, "shift"_a.noconvert(), "first"_a.noconvert(), "last"_a.noconvert(), "column"_a.noconvert(), "wide"_a.noconvert(), "low_column"_a.noconvert(), "together"_a, "out"_a.noconvert(), "Components to columns of symbols, and what has no symbol.");
    m.def("cachegen_dequantise", &dequantise, "symbols"_a.noconvert(), "step"_a, "shift"_a.noconvert(), "pull"_a.noconvert(), "column"_a.noconvert(), "wide"_a.noconvert(), "low_column"_a.noconvert(), "places"_a.noconvert(), "over"_a.noconvert(), "together"_a, "out"_a.noconvert(), "Inverse of cachegen_quantise.");
}
