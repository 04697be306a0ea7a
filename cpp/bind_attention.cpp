// What a token needs beside products with weights, between Python and the kernels.
#include <nanobind/stl/array.h>

#include <array>

#include "attention_run.h"
#include "bind_arrays.h"
#include "norm_run.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

using Strides = std::array<ptrdiff_t, 4>;

attention::Tensor tensor_of(uintptr_t at, const Strides& strides) {
    if (!at) throw std::invalid_argument("attention: no memory at null");
    if (strides[3] != 1) throw std::invalid_argument("attention: the last dimension is contiguous");
    return {reinterpret_cast<const void*>(at), {strides[0], strides[1], strides[2]}};
}

void attend(const std::array<size_t, 7>& shape, const char* type, uintptr_t q, const Strides& q_strides, uintptr_t k, const Strides& k_strides, uintptr_t v,
            const Strides& v_strides, uintptr_t mask, const Strides& mask_strides, bool boolean, float scale, uintptr_t out, unsigned threads) {
    attention::Call call{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], float_named(type), {}, {}, {}, {}, scale, reinterpret_cast<void*>(out)};
    call.q = tensor_of(q, q_strides), call.k = tensor_of(k, k_strides), call.v = tensor_of(v, v_strides);
    call.mask = {!mask ? attention::MaskKind::none : boolean ? attention::MaskKind::boolean : attention::MaskKind::added,
                 reinterpret_cast<const void*>(mask),
                 {mask_strides[0], mask_strides[1], mask_strides[2], mask_strides[3]}};
    if (!out) throw std::invalid_argument("attention: no memory at null");
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    attention::run(call, threads, isa);
}

void rms_norm(uintptr_t x, uintptr_t weight, uintptr_t y, size_t rows, size_t n, const char* type, float epsilon, float offset, bool rounds_first, unsigned threads) {
    if (!x || !weight || !y) throw std::invalid_argument("rms_norm: no memory at null");
    const norm::Call call{reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(weight), reinterpret_cast<void*>(y), rows, n, float_named(type), epsilon, offset,
                          rounds_first};
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    norm::run(call, threads, isa);
}

}  // namespace

void bind_attention(nb::module_& m) {
    m.def("attend", &attend, "shape"_a, "dtype"_a, "q"_a, "q_strides"_a, "k"_a, "k_strides"_a, "v"_a, "v_strides"_a, "mask"_a, "mask_strides"_a, "boolean"_a, "scale"_a, "out"_a,
          "threads"_a, "Attention at addresses; shape is batch, heads, key heads, queries, keys, widths of a key and of a value.");
    m.def("rms_norm", &rms_norm, "x"_a, "weight"_a, "y"_a, "rows"_a, "n"_a, "dtype"_a, "epsilon"_a, "offset"_a, "rounds_first"_a, "threads"_a,
          "Rows of x (rows, n), at addresses, each divided by its root mean square and multiplied by offset + weight.");
}
