// A call of normalisation over the threads of the pool.
#pragma once
#include <algorithm>

#include "dispatch.h"
#include "norm.h"
#include "pool.h"

namespace waterfill::norm {

constexpr size_t kTask = 32'768;  // numbers that are worth a thread

inline const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::norm_kernels();
    if (isa == Isa::avx2) return avx2::norm_kernels();
#endif
    (void)isa;
    return scalar::norm_kernels();
}

inline void run(const Call& call, unsigned threads, Isa isa) {
    if (!call.n) return;
    const Kernels& kernels = kernels_for(isa);
    const size_t step = (kTask + call.n - 1) / call.n;
    pool::run((call.rows + step - 1) / step, threads, [&](size_t i) { kernels.rows(call, i * step, std::min(call.rows, (i + 1) * step)); });
}

}  // namespace waterfill::norm
