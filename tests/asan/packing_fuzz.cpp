// Values of every width packed and unpacked by every kernel this machine has, under the sanitizers:
// buffers of exactly the size in use, the same bits from all, and what was packed comes back.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "packing.h"

using namespace waterfill;

namespace {

const packing::Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::packing_kernels();
    if (isa == Isa::avx2) return avx2::packing_kernels();
#endif
    (void)isa;
    return scalar::packing_kernels();
}

std::unique_ptr<uint8_t[]> exactly(const std::vector<uint8_t>& from) {
    std::unique_ptr<uint8_t[]> to(new uint8_t[from.size()]);
    std::copy(from.begin(), from.end(), to.get());
    return to;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    for (unsigned round = 0; round < rounds; ++round) {
        const unsigned width = 1 + unsigned(random(7));
        const size_t count = random(round % 16 ? 70 : 3000), nbytes = (count * width + 7) / 8;
        std::vector<uint8_t> values(count), want(nbytes);
        for (size_t i = 0; i < count; ++i) {
            values[i] = uint8_t(random(256));
            for (unsigned b = 0; b < width; ++b)
                if (values[i] >> b & 1) want[(i * width + b) / 8] |= uint8_t(1 << (i * width + b) % 8);
        }
        for (const Isa isa : isas) {
            const auto in = exactly(values), bytes = exactly(want);
            std::unique_ptr<uint8_t[]> packed(new uint8_t[nbytes]), back(new uint8_t[count]);
            kernels_for(isa).pack(in.get(), count, width, packed.get(), nbytes);
            kernels_for(isa).unpack(bytes.get(), nbytes, width, back.get(), count);
            bool same = std::equal(want.begin(), want.end(), packed.get());
            for (size_t i = 0; i < count; ++i) same &= back[i] == (values[i] & ((1 << width) - 1));
            if (!same) {
                std::printf("round %u: %s differs\n", round, isa_name(isa));
                return 1;
            }
        }
    }
    std::printf("%u rounds\n", rounds);
    return 0;
}
