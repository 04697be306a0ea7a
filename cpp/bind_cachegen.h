// What binds stored caches: arrays checked against each other. For files that bind, which are compiled once.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "bind_arrays.h"
#include "cachegen.h"
#include "dispatch.h"

namespace waterfill::cachegen {

namespace nb = nanobind;

template <class T> using Cube = nb::ndarray<T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
template <class T> using Matrix = nb::ndarray<T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Angles = std::optional<Cube<const float>>;  // (batch or 1, tokens, pairs)
using Places = Vector<const int32_t>;

inline const Kernels& kernels() {
#ifdef WATERFILL_X86
    if (chosen_isa() == Isa::avx512) return avx512::cachegen_kernels();
    if (chosen_isa() == Isa::avx2) return avx2::cachegen_kernels();
#endif
    return scalar::cachegen_kernels();
}

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

inline Pairs pairs_of(const Places& first, const Places& second, size_t width) {
    const size_t n = first.shape(0);
    require(second.shape(0) == n, "cachegen: pairs have two members");
    for (size_t i = 0; i < n; ++i)
        require(size_t(first.data()[i]) < width && size_t(second.data()[i]) < width && first.data()[i] >= 0 && second.data()[i] >= 0, "cachegen: a pair beyond the width");
    return {first.data(), second.data(), n};
}

// Words (batch, heads, tokens, width) beside floats (heads, batch * tokens, width).
struct Rows {
    size_t batch, heads, tokens, width;
    Float format;
    const float *cos, *sin;
    size_t pairs, turned;  // numbers of a row's angles; of a batch's, 0 where rows share them

    Rows(size_t b, size_t hs, size_t ts, size_t ws, const char* dtype, size_t h, size_t rows, size_t w, const Angles& c, const Angles& s, size_t n)
        : batch(b), heads(hs), tokens(ts), width(ws), format(float_named(dtype)), cos(nullptr), sin(nullptr), pairs(n), turned(0) {
        require(h == heads && rows == batch * tokens && w == width, "cachegen: shapes that do not fit each other");
        if (!c) return;
        require(s && c->shape(2) == n && s->shape(2) == n && c->shape(1) == tokens && s->shape(1) == tokens && c->shape(0) == s->shape(0) && (c->shape(0) == 1 || c->shape(0) == batch), "cachegen: angles that do not fit");
        cos = c->data(), sin = s->data(), turned = c->shape(0) == 1 ? 0 : tokens * n;
    }

    size_t size() const { return format == Float::f32 ? 4 : 2; }
};

// Columns of all components: of each its own, and of some, `wide`, one of low bits. So many tokens of a
// column lie side by side, then as many of the next one.
struct Columns {
    const int32_t *column, *wide, *low;
    size_t wides, columns, together;

    Columns(const Places& c, const Places& w, const Places& l, size_t components, size_t n, size_t side, size_t rows) : column(c.data()), wide(w.data()), low(l.data()), wides(w.shape(0)), columns(n), together(side) {
        require((side == 1 || side == kTogether) && rows % side == 0, "cachegen: groups of 32 tokens, or of one");
        require(c.shape(0) == components && l.shape(0) == wides, "cachegen: a column for each component");
        for (size_t i = 0; i < components; ++i) require(column[i] >= 0 && size_t(column[i]) < columns, "cachegen: a column beyond the others");
        for (size_t i = 0; i < wides; ++i)
            require(low[i] >= 0 && size_t(low[i]) < columns && wide[i] >= 0 && size_t(wide[i]) < components && (!i || wide[i] > wide[i - 1]), "cachegen: a column beyond the others");
    }

    // Where the first token's symbol of a column is.
    size_t at(int32_t place) const { return size_t(place) * together; }
    // Low bits' column of each component, or -1.
    std::vector<int32_t> lows(size_t components) const {
        std::vector<int32_t> found(components, -1);
        for (size_t i = 0; i < wides; ++i) found[size_t(wide[i])] = low[i];
        return found;
    }
};

}  // namespace waterfill::cachegen
