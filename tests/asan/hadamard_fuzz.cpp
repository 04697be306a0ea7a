// Walsh-Hadamard transforms of random shapes, by every kernel this machine has, under the
// sanitizers: from and into buffers of exactly the size in use, in place too, all to the same bits.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "hadamard.h"

using namespace waterfill;

namespace {

const hadamard::Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::hadamard_kernels();
    if (isa == Isa::avx2) return avx2::hadamard_kernels();
#endif
    (void)isa;
    return scalar::hadamard_kernels();
}

template <class T> std::unique_ptr<T[]> exactly(const std::vector<T>& from) {
    std::unique_ptr<T[]> to(new T[from.size()]);
    std::copy(from.begin(), from.end(), to.get());
    return to;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    for (unsigned round = 0; round < rounds; ++round) {
        const size_t block = size_t(2) << random(round % 32 ? 11 : 15);
        const size_t columns = block * (1 + random(1 + 1200 / block)), rows = 1 + random(4);
        std::vector<float> x(rows * columns), first;
        for (float& v : x) v = float(random(2001)) / 1000 - 1;
        std::vector<int8_t> signs(columns);
        for (int8_t& s : signs) s = random(2) ? 1 : -1;
        // A share of the blocks, as a thread takes them; the rest must stay as it is.
        const size_t blocks = x.size() / block, from = random(blocks), count = 1 + random(blocks - from);
        const bool signed_ = random(2), last = random(2);
        for (const Isa isa : isas)
            for (const bool in_place : {false, true}) {
                const auto in = exactly(x), out = exactly(x);
                const auto sign = exactly(signs);
                const hadamard::Job job{in_place ? out.get() : in.get(), out.get(), columns, block, float(1 / std::sqrt(double(block))),
                                        signed_ ? sign.get() : nullptr, last};
                kernels_for(isa).transform(job, from * block, count * block);
                const std::vector<float> got(out.get(), out.get() + x.size());
                if (first.empty()) first = got;
                if (std::memcmp(got.data(), first.data(), got.size() * sizeof(float)) ||
                    std::memcmp(got.data(), x.data(), from * block * sizeof(float))) {
                    std::printf("round %u: %s differs\n", round, isa_name(isa));
                    return 1;
                }
            }
    }
    std::printf("%u rounds, %zu kernels agree\n", rounds, isas.size());
    return 0;
}
