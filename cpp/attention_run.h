// A call of attention over the threads of the pool.
#pragma once
#include <memory>
#include <stdexcept>

#include "attention.h"
#include "dispatch.h"
#include "pool.h"

namespace waterfill::attention {

// Products below which one thread is done before another has begun.
constexpr size_t kAlone = 300'000;

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::attention_kernels();
    if (isa == Isa::avx2) return avx2::attention_kernels();
#endif
    (void)isa;
    return scalar::attention_kernels();
}

// Chunks are merged in their order, so that any number of threads gives the same bits.
inline void run(const Call& call, unsigned threads, Isa isa) {
    if (!call.batch || !call.queries || !call.heads || !call.value_width) return;
    if (!call.shared || call.heads % call.shared) throw std::invalid_argument("attention: query heads are no multiple of key heads");
    if (!call.keys || !call.key_width) throw std::invalid_argument("attention: there is no key to attend to");
    if (call.key_width > kMaxWidth || call.value_width > kMaxWidth) throw std::invalid_argument("attention: heads wider than 512");
    const Kernels& kernels = kernels_for(isa);
    const size_t chunks = call.chunks(), items = call.groups() * chunks, floats = call.partial_floats();
    const std::unique_ptr<float[]> partials(new float[items * floats]);
    if (call.batch * call.heads * call.queries * call.keys * (call.key_width + call.value_width) < kAlone) threads = 1;
    pool::run(items, threads, [&](size_t i) { kernels.attend(call, i / chunks, i % chunks, partials.get() + i * floats); });
    pool::run(call.groups(), chunks > 16 ? threads : 1, [&](size_t g) { kernels.merge(call, g, partials.get() + g * chunks * floats); });
}

}  // namespace waterfill::attention
