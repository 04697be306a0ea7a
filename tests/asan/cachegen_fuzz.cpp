// Groups of rows there and back through every kernel this machine has, under the sanitizers, in buffers
// of exactly the size in use: all must find the same bits, whatever the words and symbols are.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "cachegen.h"
#include "dispatch.h"
#include "fuzz.h"

using namespace waterfill;
using namespace waterfill::cachegen;

namespace {

const Kernels& kernels_for(Isa isa) {
#ifdef WATERFILL_X86
    if (isa == Isa::avx512) return avx512::cachegen_kernels();
    if (isa == Isa::avx2) return avx2::cachegen_kernels();
#endif
    (void)isa;
    return scalar::cachegen_kernels();
}

std::vector<float> floats(size_t n) {
    std::vector<float> x(n);
    for (float& one : x) one = float(int(random(2001)) - 1000) / 64;
    return x;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) { return a.empty() || std::memcmp(a.data(), b.data(), 4 * a.size()) == 0; }

// What one kernel makes of a case; buffers are its own.
struct Case {
    size_t width, kept, count, together, columns;
    Float format;
    std::vector<uint8_t> bytes;  // of all rows, and of symbols
    std::vector<int32_t> first, second;
    std::vector<float> angles, matrix, start;
    Component component;
    bool low;

    Case() : width(1 + random(70)), kept(1 + random(width)), count(random(3) ? kTogether : 1 + random(kTogether)), together(count == kTogether ? kTogether : 1), columns(2 + random(5)), format(Float(random(3))) {
        const size_t size = format == Float::f32 ? 4 : 2;
        bytes.resize(std::max(count * width * size, count * columns * 4));
        for (uint8_t& one : bytes) one = uint8_t(random(256));
        for (size_t p = 0; p < width / 2; ++p) first.push_back(int32_t(p)), second.push_back(int32_t(p + width / 2));
        angles = floats(2 * first.size() * kTogether);
        matrix = floats(kept * width);
        start = floats(kept);
        const int32_t low_end = int32_t(random(16)), high_end = 16 + int32_t(random(16));
        component = {0.5f, unsigned(random(6)), low_end, high_end, 0.25f, together, together * columns};
        low = random(2);
    }

    struct Found {
        std::vector<float> z, points, turned;
        std::vector<uint8_t> words, symbols, sides;
        std::vector<int32_t> high;
        int flags = 0;
        bool operator==(const Found& o) const { return same(z, o.z) && same(points, o.points) && words == o.words && symbols == o.symbols && sides == o.sides && same(turned, o.turned) && high == o.high && flags == o.flags; }
    };

    Found run(const Kernels& k) const {
        const size_t size = format == Float::f32 ? 4 : 2;
        // Each row a buffer of its own.
        std::vector<std::unique_ptr<uint8_t[]>> rows;
        std::vector<void*> at;
        for (size_t r = 0; r < count; ++r) {
            rows.emplace_back(new uint8_t[size * width]);
            std::memcpy(rows.back().get(), bytes.data() + r * size * width, size * width);
            // Wild exponents would make sums that are no numbers, whose bits no one promises.
            for (size_t i = 0; i < width; ++i) rows.back()[size * i + size - 1] &= 0x43;
            at.push_back(rows.back().get());
        }
        Found found;
        std::vector<float> group(width * kTogether);
        k.gather(at.data(), count, format, width, group.data());
        k.turn(group.data(), {first.data(), second.data(), first.size()}, angles.data(), angles.data() + first.size() * kTogether);
        found.z.resize(kept * kTogether);
        k.transform(group.data(), width, matrix.data(), nullptr, kept, found.z.data());
        found.symbols.assign(2 * count * columns, 0);
        found.high.assign(count, 0);
        uint8_t* out = found.symbols.data();
        found.flags = k.quantise(found.z.data(), count, component, 3.0f, found.high.data(), out, low ? out + count * columns : nullptr);
        if (count == kTogether) run_sides(k, found);
        const size_t pairs = first.size();
        const std::vector<double> some(angles.begin(), angles.begin() + std::ptrdiff_t(3 * pairs));
        const Angle angle{some.data(), some.data() + pairs, some.data() + 2 * pairs};
        found.turned.resize(2 * pairs);
        k.add_angles(angle, angle, some.data(), 17.0, pairs, found.turned.data(), found.turned.data() + pairs);
        found.points.resize(count);
        k.dequantise(bytes.data(), low ? bytes.data() + count * columns : nullptr, count, component, 0.125f, found.points.data());
        std::vector<float> back(width * kTogether);
        k.transform(group.data(), width, matrix.data(), start.data(), kept, back.data());
        k.scatter(back.data(), count, format, width, at.data());
        for (const auto& row : rows) found.words.insert(found.words.end(), row.get(), row.get() + size * width);
        return found;
    }

    // All components of a group at once: as one by one.
    void run_sides(const Kernels& k, Found& found) const {
        const std::vector<Component> each(kept, component);
        std::vector<int64_t> at(kept), lows(kept, -1);
        for (size_t i = 0; i < kept; ++i) {
            at[i] = int64_t(2 * i * kTogether);
            if (low) lows[i] = at[i] + int64_t(kTogether);
        }
        const std::unique_ptr<bool[]> others(new bool[kept]);
        found.sides.assign(2 * kept * kTogether, 0);
        const bool any = k.quantise_sides(found.z.data(), each.data(), kept, 3.0f, found.sides.data(), at.data(), lows.data(), others.get());
        bool seen = false;
        for (size_t i = 0; i < kept; ++i) {
            std::vector<int32_t> high(kTogether);
            std::vector<uint8_t> symbols(2 * kTogether);
            Component one = component;
            one.stride = kTogether;
            const int flags = k.quantise(found.z.data() + i * kTogether, kTogether, one, 3.0f, high.data(), symbols.data(), low ? symbols.data() + kTogether : nullptr);
            const bool alike = flags || std::memcmp(symbols.data(), found.sides.data() + at[i], low ? 2 * kTogether : kTogether) == 0;
            if (others[i] != (flags != 0) || !alike) {
                std::printf("a component of many is another alone\n");
                std::exit(1);
            }
            if (flags) std::memset(found.sides.data() + at[i], 0, 2 * kTogether);  // counts for nothing
            seen |= flags != 0;
        }
        if (seen != any) {
            std::printf("none or some have no symbol\n");
            std::exit(1);
        }
    }
};

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    for (unsigned round = 0; round < rounds; ++round) {
        const Case one;
        const Case::Found truth = one.run(kernels_for(Isa::scalar));
        for (Isa isa : isas)
            if (!(one.run(kernels_for(isa)) == truth)) {
                std::printf("round %u: %s finds other bits\n", round, isa_name(isa));
                return 1;
            }
    }
    std::printf("%u rounds, %zu kernels\n", rounds, isas.size());
    return 0;
}
