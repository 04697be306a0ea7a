// Coded matrices whole and damaged, through every kernel this machine has, under the sanitizers: a
// good one must give the weights it was made from, a damaged one may only be refused or give something.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "coded_encode.h"
#include "fuzz.h"

using namespace waterfill;

namespace {

using Bytes = std::vector<uint8_t>;

// Buffers of exactly the size in use, so that one byte too far is seen.
template <class T> std::unique_ptr<T[]> exactly(const std::vector<T>& values) {
    std::unique_ptr<T[]> copy(new T[values.size()]);
    std::copy(values.begin(), values.end(), copy.get());
    return copy;
}

// States given to symbols by chance; two neighbours always have some, so that every index has a symbol.
void random_table(uint8_t* table, bool raw) {
    for (unsigned grid = 0; grid < 2; ++grid) {
        unsigned slots[coded::kSymbols] = {}, next[coded::kSymbols], left[coded::kSymbols];
        slots[6] = slots[7] = slots[8] = slots[9] = 1;
        for (unsigned free = coded::kStates - 4; free;) {
            const unsigned share = random(3) ? 1 + unsigned(random(free)) : 1;
            slots[random(coded::kSymbols)] += share;
            free -= share;
        }
        std::copy(slots, slots + coded::kSymbols, next);
        std::copy(slots, slots + coded::kSymbols, left);
        for (unsigned x = 0; x < coded::kStates; ++x) {
            unsigned s = unsigned(random(coded::kSymbols));
            while (!left[s]) s = (s + 1) % coded::kSymbols;
            --left[s];
            const unsigned y = next[s]++;
            unsigned bits = 0;
            while ((y << bits) < coded::kStates) ++bits;
            const bool odd = (grid && s >= 8) != (!raw && s % 2);
            table[grid * coded::kStates + x] = uint8_t(bits << 5 | s << 1 | unsigned(odd));
            table[(2 + grid) * coded::kStates + x] = uint8_t((y << bits) - coded::kStates);
        }
    }
}

struct Problem {
    std::vector<int64_t> layout, starts;
    std::vector<uint16_t> order;
    std::vector<float> units;
    Bytes scales, row_levels, panel_levels, choice, shifts, tables, codes;
    std::vector<int32_t> levels;
    bool half;

    coded::Arrays arrays(const int64_t* of_layout, const int64_t* of_starts, const uint16_t* of_order, const float* of_units, const std::vector<std::unique_ptr<uint8_t[]>>& b) const {
        return {{of_layout, layout.size()}, {of_order, order.size()}, {of_units, units.size()}, {b[0].get(), scales.size()}, half, {b[1].get(), row_levels.size()},
                {b[2].get(), panel_levels.size()}, {b[3].get(), choice.size()}, {b[4].get(), shifts.size()}, {b[5].get(), tables.size()}, {of_starts, starts.size()}, {b[6].get(), codes.size()}};
    }
};

Bytes random_bytes(size_t count, size_t below) {
    Bytes out(count);
    for (uint8_t& byte : out) byte = uint8_t(random(below));
    return out;
}

Problem random_problem() {
    Problem p;
    const size_t m = random(6) ? 1 + random(70) : 1000 + random(80), n = 1 + random(random(2) ? 130 : 520), panels = (n + coded::kLanes - 1) / coded::kLanes;
    const TrellisCode code = kTrellisCodes[random(8)];
    const bool grouped = random(3) == 0;
    p.layout = {int64_t(m), int64_t(n), int64_t(code.states), int64_t(random(3)), int64_t(grouped ? coded::kLanes : n), int64_t(1 + random(panels)), int64_t(random(2))};
    const size_t groups = grouped ? panels : 1;
    p.half = random(2);
    for (size_t i = 0; i < m * groups; ++i) {
        const float scale = 1.0f + float(random(3));
        const uint16_t half = uint16_t(scale == 1 ? 0x3C00 : scale == 2 ? 0x4000 : 0x4200);
        const auto* at = p.half ? reinterpret_cast<const uint8_t*>(&half) : reinterpret_cast<const uint8_t*>(&scale);
        p.scales.insert(p.scales.end(), at, at + (p.half ? 2 : 4));
    }
    p.order.resize(n);
    for (size_t i = 0; i < n; ++i) p.order[i] = uint16_t(i);
    for (size_t i = n; i-- > 1;) std::swap(p.order[i], p.order[random(i + 1)]);
    p.units.resize(panels * coded::kLanes);
    for (size_t i = 0; i < n; ++i) p.units[i] = 0.25f + float(random(1000)) / 512.0f;
    const size_t count = 1 + random(4);
    p.row_levels = random_bytes(m, 1 + random(5)), p.panel_levels = random_bytes(panels, 1 + random(5)), p.choice = random_bytes(10, count);
    p.shifts = random_bytes(count, random(2) ? 1 : random(3) ? 4 : 12);
    p.tables.resize(count * coded::kTableNbytes);
    for (size_t t = 0; t < count; ++t) random_table(&p.tables[t * coded::kTableNbytes], p.shifts[t] != 0);
    // A path down each column, near zero or, where there are raw bits, as far as they reach.
    p.levels.resize(m * n);
    const int64_t reach = 20 << *std::max_element(p.shifts.begin(), p.shifts.end());
    for (size_t j = 0; j < n; ++j) {
        unsigned state = 0;
        for (size_t i = 0; i < m; ++i) {
            if (i % coded::kSegment == 0) state = 0;
            const int32_t grid = int32_t(state & 1), k = int32_t(random(uint64_t(2 * reach + 1))) - int32_t(reach);
            const int32_t away = grid && k == 0 ? 1 : k, sign = (away > 0) - (away < 0);
            p.levels[i * n + j] = code.states == 1 ? k : 2 * away - grid * sign;
            state = (state >> 1) ^ (grid ? code.feedback : 0) ^ (away & 1 ? code.input : 0);
        }
    }
    const coded::Shape shape({p.layout.data(), p.layout.size()});
    const auto levels = exactly(p.levels);
    const coded::Source source{levels.get(), 4, m, n, code.states == 1};
    const auto blocks = coded::encode(shape, source, {p.order.data(), p.row_levels.data(), p.panel_levels.data()}, {p.choice.data(), p.choice.size()}, {p.shifts.data(), p.shifts.size()},
                                      p.tables.data(), 1 + unsigned(random(2)));
    p.starts.push_back(0);
    for (const auto& block : blocks) {
        p.codes.insert(p.codes.end(), block.begin(), block.end());
        p.starts.push_back(int64_t(p.codes.size()));
    }
    return p;
}

// Some rows and a product; false where they are refused.
bool runs(const Problem& p, Isa isa, std::vector<float>& weights, std::vector<float>& product, size_t batch) {
    const auto layout = exactly(p.layout), starts = exactly(p.starts);
    const auto order = exactly(p.order);
    const auto units = exactly(p.units);
    std::vector<std::unique_ptr<uint8_t[]>> bytes;
    for (const Bytes* one : {&p.scales, &p.row_levels, &p.panel_levels, &p.choice, &p.shifts, &p.tables, &p.codes}) bytes.push_back(exactly(*one));
    try {
        const coded::Coded matrix(p.arrays(layout.get(), starts.get(), order.get(), units.get(), bytes));
        const size_t m = matrix.shape().m, n = matrix.shape().n;
        const std::unique_ptr<float[]> x(new float[batch * n]), y(new float[batch * m]), w(new float[m * n]);
        std::fill_n(x.get(), batch * n, 1.0f);
        std::vector<size_t> rows;
        std::vector<void*> outs;
        for (size_t i = 0; i < m; ++i) rows.push_back(i), outs.push_back(w.get() + i * n);
        matrix.rows(rows, outs, false, 2, isa);
        matrix.matmul(x.get(), Float::f32, y.get(), batch, 2, isa);
        const std::unique_ptr<uint16_t[]> halves(new uint16_t[batch * n]), y16(new uint16_t[batch * m]), w16(new uint16_t[n]);
        std::fill_n(halves.get(), batch * n, uint16_t(0x3F80));
        matrix.matmul(halves.get(), random(2) ? Float::bf16 : Float::f16, y16.get(), batch, 1, isa);
        matrix.rows({m - 1}, {w16.get()}, true, 1, isa);
        weights.assign(w.get(), w.get() + m * n);
        product.assign(y.get(), y.get() + batch * m);
        return true;
    } catch (const std::invalid_argument&) {
        return false;
    } catch (const std::runtime_error&) {
        return false;
    }
}

float rounded(float value, int64_t dtype) {
    if (dtype == 0) return value;
    const uint16_t half = dtype == 1 ? coded::as_bf16(value) : coded::as_half(value);
    return coded::as_float(half, Float(dtype));
}

bool are_the_weights(const Problem& p, const std::vector<float>& weights) {
    const size_t m = size_t(p.layout[0]), n = size_t(p.layout[1]), group = size_t(p.layout[4]);
    const int32_t times = p.layout[2] == 1 ? 2 : 1;
    for (size_t position = 0; position < n; ++position)
        for (size_t i = 0; i < m; ++i) {
            const size_t at = position / group * m + i;
            float scale;
            if (p.half) {
                uint16_t half;
                std::memcpy(&half, &p.scales[2 * at], 2);
                scale = coded::from_half(half);
            } else {
                std::memcpy(&scale, &p.scales[4 * at], 4);
            }
            const float value = float(p.levels[i * n + p.order[position]] * times) * p.units[position] * scale;
            if (weights[i * n + p.order[position]] != rounded(value, p.layout[3])) return false;
        }
    return true;
}

void damage(Problem& p) {
    const auto any = [](Bytes& bytes) {
        if (!bytes.empty()) bytes[random(bytes.size())] = uint8_t(random(256));
    };
    switch (random(10)) {
        case 0: p.layout[random(p.layout.size())] = int64_t(random(random(2) ? 5 : 1 << 20)) - 1; break;
        case 1: p.starts[random(p.starts.size())] += int64_t(random(9)) - 4; break;
        case 2: any(p.tables); break;
        case 3: any(p.choice), any(p.shifts); break;
        case 4: any(p.row_levels), any(p.panel_levels); break;
        case 5: p.order[random(p.order.size())] = uint16_t(random(600)); break;
        case 6: p.codes.resize(random(p.codes.size() + 1)), p.starts.back() = int64_t(p.codes.size()); break;
        case 7: for (size_t i = 0; i < 12 && i < p.codes.size(); ++i) if (!random(3)) p.codes[i] = uint8_t(random(256)); break;
        default: for (size_t i = 0; i < 1 + random(8); ++i) any(p.codes);
    }
}

int fails(unsigned round, Isa isa, const char* how) {
    std::printf("round %u: %s %s\n", round, isa_name(isa), how);
    return 1;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 200;
    unsigned refused = 0, passed = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        const Problem p = random_problem();
        std::vector<Problem> broken(4, p);
        for (Problem& one : broken) damage(one);
        const size_t batch = 1 + random(coded::kMaxBatch);
        std::vector<float> weights, product;
        for (const Isa isa : available()) {
            if (!runs(p, isa, weights, product, batch)) return fails(round, isa, "refuses a good matrix");
            if (!are_the_weights(p, weights)) return fails(round, isa, "gives other weights");
            for (const Problem& one : broken) (runs(one, isa, weights, product, batch) ? passed : refused) += 1;
        }
    }
    std::printf("%u rounds: %u damaged streams refused, %u consistent\n", rounds, refused, passed);
    return 0;
}
