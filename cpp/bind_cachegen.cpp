// Checks shapes and indices, picks the instruction set, releases the GIL; one thread.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bind_arrays.h"
#include "cachegen.h"
#include "dispatch.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

template <class T> using Cube = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<nb::ndim<4>, nb::device::cpu>;
using Angles = std::optional<Cube<const float>>;  // (batch or 1, tokens, pairs)
using Places = Vector<const int32_t>;

const cachegen::Kernels& kernels() {
#ifdef WATERFILL_X86
    if (chosen_isa() == Isa::avx512) return avx512::cachegen_kernels();
    if (chosen_isa() == Isa::avx2) return avx2::cachegen_kernels();
#endif
    return scalar::cachegen_kernels();
}

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

bool counts_up(const int32_t* x, size_t n) {
    for (size_t i = 1; i < n; ++i)
        if (x[i] != x[0] + int32_t(i)) return false;
    return n > 0;
}

cachegen::Pairs pairs_of(const Places& first, const Places& second, size_t width) {
    const size_t n = first.shape(0);
    require(second.shape(0) == n, "cachegen: pairs have two members");
    for (size_t i = 0; i < n; ++i)
        require(size_t(first.data()[i]) < width && size_t(second.data()[i]) < width && first.data()[i] >= 0 && second.data()[i] >= 0, "cachegen: a pair beyond the width");
    bool run = counts_up(first.data(), n) && counts_up(second.data(), n);
    if (run) {
        const int32_t gap = first.data()[0] - second.data()[0];
        run = size_t(gap < 0 ? -gap : gap) >= n;
    }
    return {first.data(), second.data(), n, run};
}

// Words (batch, heads, tokens, width) beside floats (heads, batch * tokens, width).
struct Rows {
    size_t batch, heads, tokens, width;
    Float format;
    const float *cos, *sin;
    size_t pairs, turned;  // numbers of a row's angles; of a batch's, 0 where rows share them

    Rows(const Words& words, const char* dtype, size_t h, size_t rows, size_t w, const Angles& c, const Angles& s, size_t n)
        : batch(words.shape(0)), heads(words.shape(1)), tokens(words.shape(2)), width(words.shape(3)), format(float_named(dtype)), cos(nullptr), sin(nullptr), pairs(n), turned(0) {
        require(words.itemsize() == (format == Float::f32 ? 4 : 2), "cachegen: words of another size");
        require(width == 0 || words.stride(3) == 1, "cachegen: rows that do not lie in one piece");
        require(h == heads && rows == batch * tokens && w == width, "cachegen: shapes that do not fit each other");
        if (!c) return;
        require(s && c->shape(2) == n && s->shape(2) == n && c->shape(1) == tokens && s->shape(1) == tokens && c->shape(0) == s->shape(0) && (c->shape(0) == 1 || c->shape(0) == batch), "cachegen: angles that do not fit");
        cos = c->data(), sin = s->data(), turned = c->shape(0) == 1 ? 0 : tokens * n;
    }

    template <class Do> void each(const Words& words, Do&& run) const {
        char* base = static_cast<char*>(words.data());
        const int64_t size = format == Float::f32 ? 4 : 2;
        for (size_t h = 0; h < heads; ++h)
            for (size_t b = 0; b < batch; ++b)
                for (size_t t = 0; t < tokens; ++t) {
                    char* at = base + size * (int64_t(b) * words.stride(0) + int64_t(h) * words.stride(1) + int64_t(t) * words.stride(2));
                    const size_t angle = b * turned + t * pairs;
                    run(at, ((h * batch + b) * tokens + t) * width, h, cos ? cos + angle : nullptr, cos ? sin + angle : nullptr);
                }
    }
};

void read_rows(const Words& words, const char* dtype, const Places& first, const Places& second, const Angles& cos, const Angles& sin, const Cube<float>& out) {
    const Rows rows(words, dtype, out.shape(0), out.shape(1), out.shape(2), cos, sin, first.shape(0));
    const auto pairs = pairs_of(first, second, rows.width);
    const auto run = kernels().read;
    nb::gil_scoped_release release;
    rows.each(words, [&](const char* at, size_t to, size_t, const float* c, const float* s) { run(at, rows.format, rows.width, pairs, c, s, out.data() + to); });
}

void write_rows(const Cube<const float>& x, const Matrix<const float>& mean, const char* dtype, const Places& first, const Places& second, const Angles& cos, const Angles& sin, const Words& out) {
    const Rows rows(out, dtype, x.shape(0), x.shape(1), x.shape(2), cos, sin, first.shape(0));
    require(mean.shape(0) == rows.heads && mean.shape(1) == rows.width, "cachegen: a mean of another shape");
    const auto pairs = pairs_of(first, second, rows.width);
    std::vector<float> scratch(rows.width);
    const auto run = kernels().write;
    nb::gil_scoped_release release;
    rows.each(out, [&](char* at, size_t from, size_t h, const float* c, const float* s) {
        run(x.data() + from, mean.data() + h * rows.width, rows.width, pairs, c, s, scratch.data(), rows.format, at);
    });
}

// Columns of all components: of each its own, and of some, `wide`, one of low bits. So many tokens of a
// column lie side by side, then as many of the next one.
struct Columns {
    const int32_t *column, *wide, *low;
    size_t wides, columns, together;

    Columns(const Places& c, const Places& w, const Places& l, size_t components, size_t n, size_t side, size_t rows) : column(c.data()), wide(w.data()), low(l.data()), wides(w.shape(0)), columns(n), together(side) {
        require(side > 0 && rows % side == 0, "cachegen: whole groups of tokens, please");
        require(c.shape(0) == components && l.shape(0) == wides, "cachegen: a column for each component");
        for (size_t i = 0; i < components; ++i) require(column[i] >= 0 && size_t(column[i]) < columns, "cachegen: a column beyond the others");
        for (size_t i = 0; i < wides; ++i)
            require(low[i] >= 0 && size_t(low[i]) < columns && wide[i] >= 0 && size_t(wide[i]) < components && (!i || wide[i] > wide[i - 1]), "cachegen: a column beyond the others");
    }

    // Where a token's symbol in column 0 is; in others, `together` times the column further.
    size_t at(size_t row) const { return row / together * together * columns + row % together; }
};

std::pair<Owned<int64_t>, Owned<int32_t>> quantise(
    const Cube<const float>& z, const Vector<const float>& offset, float inverse, const Vector<const uint8_t>& shift, const Places& first, const Places& last,
    const Places& column, const Places& wide, const Places& low_column, size_t together, const Matrix<uint8_t>& out) {
    const size_t heads = z.shape(0), rows = z.shape(1), kept = z.shape(2), components = heads * kept;
    require(out.shape(0) == rows && offset.shape(0) == components && shift.shape(0) == components && first.shape(0) == components && last.shape(0) == components, "cachegen: shapes that do not fit each other");
    const Columns c(column, wide, low_column, components, out.shape(1), together, rows);
    std::vector<int32_t> high(kept);
    std::vector<uint8_t> symbols(kept), low(kept);
    std::vector<int64_t> places;
    std::vector<int32_t> over;
    const auto run = kernels().quantise;
    bool far = false;
    {
        nb::gil_scoped_release release;
        size_t w = 0;
        for (size_t h = 0; h < heads; ++h) {
            const size_t at = h * kept;
            size_t wend = w;
            while (wend < c.wides && size_t(c.wide[wend]) < at + kept) ++wend;
            const cachegen::Head head{kept, offset.data() + at, shift.data() + at, first.data() + at, last.data() + at, nullptr, nullptr};
            for (size_t r = 0; r < rows; ++r) {
                const int flags = run(z.data() + (h * rows + r) * kept, head, inverse, high.data(), symbols.data(), low.data());
                uint8_t* to = out.data() + c.at(r);
                for (size_t i = 0; i < kept; ++i) to[c.column[at + i] * together] = symbols[i];
                for (size_t i = w; i < wend; ++i) to[c.low[i] * together] = low[c.wide[i] - at];
                far |= flags >> 1;
                if (flags & 1)
                    for (size_t i = 0; i < kept; ++i)
                        if (high[i] != symbols[i]) places.push_back(int64_t(r * components + at + i)), over.push_back(high[i] - symbols[i]);
            }
            w = wend;
        }
    }
    if (far) throw std::runtime_error("numbers that are not finite, or too large for this level");
    return {owned(std::move(places)), owned(std::move(over))};
}

void dequantise(const Matrix<const uint8_t>& symbols, float step, const Vector<const float>& scale, const Vector<const float>& pull, const Places& column, const Places& wide, const Places& low_column, const Vector<const int64_t>& places, const Vector<const int32_t>& over, size_t together, const Cube<float>& out) {
    const size_t heads = out.shape(0), rows = out.shape(1), kept = out.shape(2), components = heads * kept;
    require(symbols.shape(0) == rows && scale.shape(0) == components && pull.shape(0) == components && places.shape(0) == over.shape(0), "cachegen: shapes that do not fit each other");
    const Columns c(column, wide, low_column, components, symbols.shape(1), together, rows);
    for (size_t i = 0; i < places.shape(0); ++i) require(places.data()[i] >= 0 && size_t(places.data()[i]) < rows * components, "cachegen: a place beyond the others");
    std::vector<uint8_t> row(kept);
    const auto &run = kernels();
    nb::gil_scoped_release release;
    size_t w = 0;
    for (size_t h = 0; h < heads; ++h) {
        const size_t at = h * kept;
        size_t wend = w;
        while (wend < c.wides && size_t(c.wide[wend]) < at + kept) ++wend;
        const cachegen::Head head{kept, nullptr, nullptr, nullptr, nullptr, scale.data() + at, pull.data() + at};
        for (size_t r = 0; r < rows; ++r) {
            const uint8_t* from = symbols.data() + c.at(r);
            float* to = out.data() + (h * rows + r) * kept;
            for (size_t i = 0; i < kept; ++i) row[i] = from[c.column[at + i] * together];
            run.widen(row.data(), head, to);
            for (size_t i = w; i < wend; ++i) to[c.wide[i] - at] += float(from[c.low[i] * together]) - 0.5f * scale.data()[c.wide[i]];
            run.finish(head, step, to);
        }
        w = wend;
    }
    // What had no symbol of its own, once more from its nearest.
    for (size_t i = 0; i < places.shape(0); ++i) {
        const size_t r = size_t(places.data()[i]) / components, j = size_t(places.data()[i]) % components;
        const uint8_t* from = symbols.data() + c.at(r);
        float k = float(int(from[c.column[j] * together]) - cachegen::kMiddle + over.data()[i]) * scale.data()[j];
        const int32_t* found = std::lower_bound(c.wide, c.wide + c.wides, int32_t(j));
        if (found != c.wide + c.wides && *found == int32_t(j)) k += float(from[c.low[found - c.wide] * together]) - 0.5f * scale.data()[j];
        const cachegen::Head one{1, nullptr, nullptr, nullptr, nullptr, scale.data() + j, pull.data() + j};
        run.finish(one, step, &k);
        out.data()[(j / kept * rows + r) * kept + j % kept] = k;
    }
}

}  // namespace

void bind_cachegen(nb::module_& m) {
    m.def("cachegen_read", &read_rows, "words"_a, "dtype"_a, "first"_a.noconvert(), "second"_a.noconvert(), "cos"_a.none().noconvert(), "sin"_a.none().noconvert(), "out"_a.noconvert(), "Rows of keys or values to floats, turned.");
    m.def("cachegen_write", &write_rows, "x"_a.noconvert(), "mean"_a.noconvert(), "dtype"_a, "first"_a.noconvert(), "second"_a.noconvert(), "cos"_a.none().noconvert(), "sin"_a.none().noconvert(), "out"_a, "Rows of floats and a mean, turned, to a format.");
    m.def("cachegen_quantise", &quantise, "z"_a.noconvert(), "offset"_a.noconvert(), "inverse"_a, "shift"_a.noconvert(), "first"_a.noconvert(), "last"_a.noconvert(), "column"_a.noconvert(), "wide"_a.noconvert(), "low_column"_a.noconvert(), "together"_a, "out"_a.noconvert(), "Components to columns of symbols, and what has no symbol.");
    m.def("cachegen_dequantise", &dequantise, "symbols"_a.noconvert(), "step"_a, "scale"_a.noconvert(), "pull"_a.noconvert(), "column"_a.noconvert(), "wide"_a.noconvert(), "low_column"_a.noconvert(), "places"_a.noconvert(), "over"_a.noconvert(), "together"_a, "out"_a.noconvert(), "Inverse of cachegen_quantise.");
}
