// Arrays and names of formats between Python and the kernels. For files that bind, which are compiled
// once.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "floats.h"

namespace waterfill {

template <class T> using Vector = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <class T> using Owned = nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<1>>;

template <class T> Owned<T> owned(std::vector<T> values) {
    auto* kept = new std::vector<T>(std::move(values));
    return {kept->data(), {kept->size()}, nanobind::capsule(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); })};
}

// As safetensors calls it.
inline Float float_named(const char* name) {
    if (!std::strcmp(name, "F32")) return Float::f32;
    if (!std::strcmp(name, "BF16")) return Float::bf16;
    if (!std::strcmp(name, "F16")) return Float::f16;
    throw std::invalid_argument("numbers are F32, BF16 or F16");
}

}  // namespace waterfill
