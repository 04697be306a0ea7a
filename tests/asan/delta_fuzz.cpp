// Changes whole and damaged, through every decoder this machine has, under the sanitizers: good
// symbols must give the new words, damaged ones may only be refused or come back as something.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "delta_stream.h"
#include "fuzz.h"

using namespace waterfill;

namespace {

constexpr delta::Words kWords[] = {
    {1, false, 0, 0, 0}, {1, true, 3, 0xF, 0},   {2, false, 0, 0, 0}, {2, true, 7, 0xFF, 0},       {2, true, 10, 0x1F, 0},
    {4, false, 0, 0, 0}, {4, true, 23, 0xFF, 0}, {8, false, 0, 0, 0}, {8, true, 52, 0x7FF, 831},
};

// Buffers of exactly the size in use, so that one byte too far is seen.
std::unique_ptr<uint8_t[]> exactly(const std::string& bytes) {
    std::unique_ptr<uint8_t[]> copy(new uint8_t[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), copy.get());
    return copy;
}

struct Problem {
    delta::Words words;
    size_t n;
    std::string old, now, first;

    delta::Contexts contexts() const { return {reinterpret_cast<const uint8_t*>(first.data()), unsigned(first.size() + 1)}; }
};

struct Coded {
    delta::Packed packed;
    std::vector<int64_t> counts, gaps, sizes;
};

Coded encode(const Problem& p, Isa isa) {
    const size_t contexts = p.first.size() + 1;
    Coded coded;
    coded.counts.resize(contexts * delta::blocks_of(p.n));
    coded.gaps.resize(contexts * 256);
    coded.sizes.resize(contexts * 256);
    const auto old = exactly(p.old), now = exactly(p.now);
    std::vector<int64_t> elements(256), seen(256 * p.words.size_symbols());
    delta::survey(p.words, old.get(), now.get(), p.n, elements.data(), seen.data(), 2, isa);
    coded.packed = delta::pack(p.words, p.contexts(), old.get(), now.get(), p.n, {coded.counts.data(), coded.gaps.data(), coded.sizes.data()}, 2, isa);
    return coded;
}

bool decodes(const Problem& p, const Coded& coded, std::string& out, bool in_place, Isa isa) {
    const auto old = exactly(p.old), gaps = exactly(coded.packed.gaps), sizes = exactly(coded.packed.sizes), raw = exactly(coded.packed.raw);
    const auto apart = exactly(p.old);
    uint8_t* const to = in_place ? old.get() : apart.get();
    const delta::Symbols symbols{coded.counts.data(), gaps.get(), sizes.get(), coded.packed.gaps.size(), raw.get(), coded.packed.raw.size()};
    try {
        delta::apply(p.words, p.contexts(), old.get(), to, p.n, symbols, 2, isa);
    } catch (const rans::FormatError&) {
        return false;
    }
    out.assign(reinterpret_cast<const char*>(to), p.old.size());
    return true;
}

Problem random_problem(unsigned round) {
    Problem p{kWords[random(9)], 1 + random(700), {}, {}, {}};
    if (round % 64 == 0) p.n = delta::kBlock + random(3000);
    const uint64_t spread = 1ull << random(8), change = 1 + random(80);
    for (size_t i = 0; i < p.n; ++i) {
        const uint64_t word = random(spread) * 0x0101010101010101u ^ random(1ull << 20);
        const uint64_t moved = random(change) ? word : random(4) ? word + random(9) - 4 : word ^ random(~0ull);
        p.old.append(reinterpret_cast<const char*>(&word), p.words.width);
        p.now.append(reinterpret_cast<const char*>(&moved), p.words.width);
    }
    if (p.words.mask)
        for (unsigned e = 1 + unsigned(random(40)); e < 256 && p.first.size() + 1 < delta::kMaxContexts; e += 1 + unsigned(random(60))) p.first.push_back(char(e));
    return p;
}

void spoil(Coded& coded) {
    switch (random(4)) {
        case 0: damage(coded.packed.raw); break;
        case 1: coded.counts[random(coded.counts.size())] += int64_t(random(7)) - 3; break;
        case 2: if (!coded.packed.gaps.empty()) coded.packed.gaps[random(coded.packed.gaps.size())] = char(random(256)); break;
        default: if (!coded.packed.sizes.empty()) coded.packed.sizes[random(coded.packed.sizes.size())] = char(random(256));
    }
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    unsigned refused = 0, passed = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        const Problem p = random_problem(round);
        const Coded coded = encode(p, isas[random(isas.size())]);
        Coded broken = coded;
        spoil(broken);
        std::string first;
        for (const Isa isa : isas) {
            const Coded again = encode(p, isa);
            std::string out;
            if (again.packed.gaps != coded.packed.gaps || again.packed.sizes != coded.packed.sizes || again.packed.raw != coded.packed.raw ||
                again.counts != coded.counts || !decodes(p, coded, out, random(2), isa) || out != p.now) {
                std::printf("round %u: %s does not decode what was encoded\n", round, isa_name(isa));
                return 1;
            }
            const bool whole = decodes(p, broken, out, random(2), isa);
            (whole ? passed : refused) += 1;
            if (!whole) continue;
            if (first.empty()) first = out;
            if (out != first) {
                std::printf("round %u: %s reads damaged symbols differently\n", round, isa_name(isa));
                return 1;
            }
        }
    }
    std::printf("%u rounds, %zu decoders: %u damaged streams refused, %u consistent\n", rounds, isas.size(), refused, passed);
    return 0;
}
