// Root-mean-square normalisation. Compiled once per instruction set; see dispatch.h.
#include <algorithm>
#include <cmath>

#include "lanes16.h"
#include "norm.h"

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace norm;

template <Float Type> void rows_as(const Call& call, size_t first, size_t last) {
    using T = typename Stored<Type>::type;
    const size_t n = call.n, whole = n / kLanes * kLanes, rest = n - whole;
    const T* weight = static_cast<const T*>(call.weight);
    const Lanes16 offset = Lanes16::of(call.offset);
    for (size_t i = first; i < last; ++i) {
        const T* x = static_cast<const T*>(call.x) + i * n;
        T* y = static_cast<T*>(call.y) + i * n;
        Lanes16 squares = Lanes16::of(0);
        for (size_t j = 0; j < whole; j += kLanes) {
            const Lanes16 value = Lanes16::load<Type>(x + j);
            squares = squares + value * value;
        }
        const Lanes16 end = Lanes16::load<Type>(x + whole, rest);
        const Lanes16 factor = Lanes16::of(1 / std::sqrt((squares + end * end).sum() / float(n) + call.epsilon));
        const auto normal = [&](const Lanes16& value, const Lanes16& w) {
            const Lanes16 scaled = value * factor;
            return (call.rounds_first ? scaled.template rounded<Type>() : scaled) * (offset + w);
        };
        for (size_t j = 0; j < whole; j += kLanes) normal(Lanes16::load<Type>(x + j), Lanes16::load<Type>(weight + j)).template store<Type>(y + j);
        if (rest) normal(end, Lanes16::load<Type>(weight + whole, rest)).template store<Type>(y + whole, rest);
    }
}

void rows(const Call& call, size_t first, size_t last) {
    if (call.type == Float::f32) rows_as<Float::f32>(call, first, last);
    else if (call.type == Float::bf16) rows_as<Float::bf16>(call, first, last);
    else rows_as<Float::f16>(call, first, last);
}

const Kernels kTable{rows};

}  // namespace

const norm::Kernels& norm_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
