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

using Doubles = nb::ndarray<const double, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// Positions first, first + 1, ..: of each a base's angles, every `few` one's, and so many more.
void angles(int64_t first, const Vector<const double>& frequencies, const Doubles& bases, const Doubles& more, const Matrix<float>& cos, const Matrix<float>& sin) {
    const size_t pairs = frequencies.shape(0), few = more.shape(1), tokens = cos.shape(0);
    require(bases.shape(0) == 3 && more.shape(0) == 3 && bases.shape(2) == pairs && more.shape(2) == pairs && cos.shape(1) == pairs && sin.shape(1) == pairs && sin.shape(0) == tokens, "cachegen: angles that do not fit");
    require(few > 0 && bases.shape(1) >= (tokens + few - 1) / few, "cachegen: a base for each of so many tokens");
    const auto of = [pairs](const Doubles& x, size_t i) {
        const size_t all = x.shape(1) * pairs;
        return Angle{x.data() + i * pairs, x.data() + all + i * pairs, x.data() + 2 * all + i * pairs};
    };
    const auto run = kernels().add_angles;
    nb::gil_scoped_release release;
    for (size_t t = 0; t < tokens; ++t)
        run(of(bases, t / few), of(more, t % few), frequencies.data(), double(first + int64_t(t)), pairs, cos.data() + t * pairs, sin.data() + t * pairs);
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
    m.def("cachegen_angles", &angles, "first"_a, "frequencies"_a.noconvert(), "bases"_a.noconvert(), "more"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "Cosines and sines of consecutive positions' angles.");
    m.def("cachegen_quantise", &quantise, "z"_a.noconvert(), "offset"_a.noconvert(), "inverse"_a, "shift"_a.noconvert(), "first"_a.noconvert(), "last"_a.noconvert(), "column"_a.noconvert(), "wide"_a.noconvert(), "low_column"_a.noconvert(), "together"_a, "out"_a.noconvert(), "Components to columns of symbols, and what has no symbol.");
    m.def("cachegen_dequantise", &dequantise, "symbols"_a.noconvert(), "step"_a, "shift"_a.noconvert(), "pull"_a.noconvert(), "column"_a.noconvert(), "wide"_a.noconvert(), "low_column"_a.noconvert(), "places"_a.noconvert(), "over"_a.noconvert(), "together"_a, "out"_a.noconvert(), "Inverse of cachegen_quantise.");
}
