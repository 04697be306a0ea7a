// Codebook matrices of random shapes, by every kernel this machine has, under the sanitizers: packed,
// multiplied and read back in buffers of exactly the size in use, all to the same bits.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "fuzz.h"
#include "packed_matrix.h"

using namespace waterfill;

namespace {

template <class T> std::unique_ptr<T[]> exactly(const std::vector<T>& from) {
    std::unique_ptr<T[]> to(new T[from.size()]);
    std::copy(from.begin(), from.end(), to.get());
    return to;
}

// Products and weights, end to end.
struct Case {
    size_t m, n, group, batch;
    unsigned planes;
    std::vector<int8_t> levels, table;
    std::vector<float> scales, steps, x;
    std::vector<int64_t> layout, indices;

    Case() : m(1 + random(70)), n(1 + random(random(8) ? 150 : 1000)), group(random(2) ? n : std::min(n, 32 * (1 + random(9)))), batch(1 + random(packed::kMaxBatch)), planes(1 + unsigned(random(2))) {
        levels.resize(m * n), table.resize(packed::kEntries), x.resize(batch * n);
        for (int8_t& v : levels) v = int8_t(int(random(16)) - 8);
        for (int8_t& v : table) v = int8_t(random(256));
        for (float& v : x) v = float(random(2001)) / 1000 - 1;
        if (random(2)) steps.resize(n, 0.5f);
        layout = {int64_t(m), int64_t(n), int64_t(group), 4, int64_t(n)};
        const packed::Matrix geometry = packed::geometry_of(layout.data(), layout.size());
        scales.resize(geometry.blocks * geometry.groups * packed::kRows);
        for (float& v : scales) v = float(random(1000)) / 1000;
        for (size_t i = 0; i < 5; ++i) indices.push_back(int64_t(random(m)));
    }

    packed::Arrays arrays(const std::unique_ptr<uint8_t[]>& codes, size_t n_codes) const {
        packed::Arrays out{};
        out.layout = layout.data(), out.n_layout = layout.size();
        out.codes = codes.get(), out.n_codes = n_codes;
        out.scales = scales.data(), out.scales_nbytes = scales.size() * sizeof(float);
        out.steps = steps.data(), out.n_steps = steps.size();
        out.table = table.data(), out.n_table = table.size();
        return out;
    }

    std::vector<float> through(Isa isa) const {
        const packed::Matrix geometry = packed::geometry_of(layout.data(), layout.size());
        const size_t n_codes = geometry.blocks * geometry.block_nbytes;
        const std::unique_ptr<uint8_t[]> codes(new uint8_t[n_codes]);
        std::vector<int64_t> starts;
        std::vector<uint32_t> corrections;
        if (!packed::pack(geometry, {levels.data(), 1}, codes.get(), starts, corrections, 2, isa) || !corrections.empty()) return {};
        const packed::Matrix matrix = packed::matrix_of(arrays(codes, n_codes));
        const auto in = exactly(x);
        const std::unique_ptr<float[]> y(new float[batch * m]), rows(new float[m * n]), some(new float[indices.size() * n]);
        packed::matmul(matrix, {in.get(), Float::f32}, batch, planes, {y.get(), Float::f32}, 2, isa);
        packed::rows(matrix, 0, m, {rows.get(), Float::f32}, 2, isa);
        packed::gather(matrix, indices.data(), indices.size(), {some.get(), Float::f32}, 2, isa);
        std::vector<float> all(y.get(), y.get() + batch * m);
        all.insert(all.end(), rows.get(), rows.get() + m * n);
        all.insert(all.end(), some.get(), some.get() + indices.size() * n);
        return all;
    }

    // Whether weight (i, j) is what its code stands for.
    bool right(const std::vector<float>& all) const {
        const packed::Matrix geometry = packed::geometry_of(layout.data(), layout.size());
        for (size_t i = 0; i < m; ++i)
            for (size_t j = 0; j < n; ++j) {
                const float scale = scales[(i / packed::kRows * geometry.groups + j / group) * packed::kRows + i % packed::kRows];
                const float value = float(table[size_t(levels[i * n + j] + 8)]) * (steps.empty() ? 1.0f : 0.5f) * scale;
                if (all[batch * m + i * n + j] != value) return false;
            }
        return true;
    }
};

bool refused(packed::Arrays arrays) {
    try {
        packed::matrix_of(arrays);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    const std::vector<Isa> isas = available();
    for (unsigned round = 0; round < rounds; ++round) {
        const Case one;
        const std::vector<float> first = one.through(isas[0]);
        if (first.empty() || !one.right(first)) {
            std::printf("round %u: not what was packed\n", round);
            return 1;
        }
        for (const Isa isa : isas) {
            const std::vector<float> all = one.through(isa);
            if (all.size() != first.size() || std::memcmp(all.data(), first.data(), all.size() * sizeof(float))) {
                std::printf("round %u: %s differs\n", round, isa_name(isa));
                return 1;
            }
        }
        const packed::Matrix geometry = packed::geometry_of(one.layout.data(), one.layout.size());
        const size_t n_codes = geometry.blocks * geometry.block_nbytes;
        const std::unique_ptr<uint8_t[]> codes(new uint8_t[n_codes]);
        packed::Arrays wrong = one.arrays(codes, n_codes);
        wrong.n_table = random(packed::kEntries - 1) + 1;
        if (!refused(wrong)) {
            std::printf("round %u: a table of %zu levels\n", round, wrong.n_table);
            return 1;
        }
    }
    std::printf("%u rounds, %zu kernels agree\n", rounds, isas.size());
    return 0;
}
