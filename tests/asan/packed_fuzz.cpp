// Packed matrices of every width and of odd shapes, in buffers of exactly the size they need: no
// kernel reads or writes beside them, all instruction sets agree, and weights come back.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fuzz.h"
#include "packed_matrix.h"

using namespace waterfill;
using namespace waterfill::packed;

namespace {

template <class T> std::vector<T> exactly(size_t count) { return std::vector<T>(count); }

struct Problem {
    std::vector<int64_t> layout;
    std::vector<int32_t> levels, order;
    std::vector<float> steps, x;
    std::vector<uint8_t> scales;
    size_t m, n, batch;
    unsigned planes;
    bool half;
};

Problem make(unsigned round) {
    Problem p;
    p.m = 1 + random(40), p.n = 1 + random(round % 8 ? 150 : 700), p.batch = 1 + random(kMaxBatch), p.planes = 1 + unsigned(random(2));
    p.half = random(2);
    const bool sorted = random(2);
    std::vector<int64_t> segments;
    size_t rest = p.n;
    for (unsigned bits = 2 + unsigned(random(3)); sorted && bits < 8 && rest > kColumns; ++bits) {
        const size_t wide = std::min<size_t>(random(4), (rest - 1) / kColumns) * kColumns;
        if (wide) segments.insert(segments.end(), {int64_t(bits), int64_t(wide)});
        rest -= wide;
    }
    segments.insert(segments.end(), {sorted ? 8 : 2 + int64_t(random(7)), int64_t(rest)});
    const size_t group = sorted || random(2) ? p.n : std::min<size_t>(p.n, kColumns * (1 + random(6)));
    p.layout = {int64_t(p.m), int64_t(p.n), int64_t(group)};
    p.layout.insert(p.layout.end(), segments.begin(), segments.end());
    const Matrix g = geometry_of(p.layout.data(), p.layout.size());
    for (size_t i = 0; i < g.blocks * g.groups * kRows; ++i) {
        const uint16_t small = uint16_t(0x2000 + random(4096));
        const float wide = float(1 + random(1000)) / 4096;
        const auto* bytes = p.half ? reinterpret_cast<const uint8_t*>(&small) : reinterpret_cast<const uint8_t*>(&wide);
        p.scales.insert(p.scales.end(), bytes, bytes + (p.half ? 2 : 4));
    }
    if (sorted) {
        for (size_t j = 0; j < p.n; ++j) p.order.push_back(int32_t(j));
        for (size_t j = p.n; j > 1; --j) std::swap(p.order[j - 1], p.order[random(j)]);
        for (size_t j = 0; j < p.n; ++j) p.steps.push_back(float(1 + random(100)) / 64);
    }
    const int32_t top = 1 << (g.segments[0].bits - 1);
    for (size_t i = 0; i < p.m * p.n; ++i) p.levels.push_back(sorted && !random(50) ? int32_t(random(6000)) - 3000 : int32_t(random(2 * size_t(top))) - top);
    for (size_t i = 0; i < p.batch * p.n; ++i) p.x.push_back((float(random(2000)) - 1000) / 512);
    return p;
}

// One of the three kinds, rounded towards zero: what is read is the same for all.
std::vector<uint8_t> stored(const std::vector<float>& x, Float type) {
    std::vector<uint8_t> out(x.size() * (type == Float::f32 ? 4 : 2));
    for (size_t i = 0; i < x.size(); ++i) {
        if (type == Float::f32) std::memcpy(&out[4 * i], &x[i], 4);
        else if (type == Float::bf16) std::memcpy(&out[2 * i], reinterpret_cast<const uint8_t*>(&x[i]) + 2, 2);
        else out[2 * i] = uint8_t(i), out[2 * i + 1] = uint8_t(0x30 | i % 13);
    }
    return out;
}

struct Built {
    std::vector<uint8_t> codes;
    std::vector<int64_t> starts;
    std::vector<uint32_t> corrections;
};

Built pack_with(const Problem& p, Isa isa) {
    Matrix g = geometry_of(p.layout.data(), p.layout.size());
    g.order = p.order.empty() ? nullptr : p.order.data();
    Built out;
    out.codes = exactly<uint8_t>(g.blocks * g.block_nbytes);
    out.starts.push_back(0);
    for (size_t block = 0; block < g.blocks; ++block) {
        std::vector<uint32_t> words(kRows * g.n);
        const size_t count = kernels_for(isa).pack(g, {p.levels.data(), 4}, block, out.codes.data() + block * g.block_nbytes, words.data(), words.size());
        if (count > words.size()) std::abort();
        out.corrections.insert(out.corrections.end(), words.begin(), words.begin() + std::ptrdiff_t(count));
        out.starts.push_back(int64_t(out.corrections.size()));
    }
    out.corrections.shrink_to_fit();
    return out;
}

Matrix matrix_from(const Problem& p, const Built& built) {
    const bool corrected = !built.corrections.empty();
    return matrix_of({p.layout.data(), p.layout.size(), built.codes.data(), built.codes.size(), p.scales.data(), p.scales.size(), p.half, p.order.data(), p.order.size(),
                      p.steps.data(), p.steps.size(), corrected ? built.starts.data() : nullptr, corrected ? built.starts.size() : 0, built.corrections.data(),
                      built.corrections.size()});
}

std::vector<uint8_t> multiply_with(const Problem& p, const Matrix& matrix, const std::vector<uint8_t>& x, Float type, Isa isa) {
    auto levels = exactly<int8_t>(matrix.tiles * kColumns * p.batch * p.planes);
    auto sums = exactly<int32_t>(matrix.chunks * p.batch * p.planes);
    auto scales = exactly<float>(matrix.chunks * p.batch);
    auto values = exactly<float>(matrix.starts ? p.n * p.batch : 0);
    const Activations rounded{p.batch, p.planes, levels.data(), sums.data(), scales.data(), values.data()};
    kernels_for(isa).quantise(matrix, {x.data(), type}, rounded);
    auto y = exactly<uint8_t>(p.batch * p.m * width_of(type));
    for (size_t block = 0; block < matrix.blocks; ++block) kernels_for(isa).multiply(matrix, rounded, block, block + 1, {y.data(), type});
    auto again = exactly<uint8_t>(y.size());
    matmul(matrix, {x.data(), type}, p.batch, p.planes, {again.data(), type}, 3, isa);
    if (again != y) std::abort();
    return y;
}

bool weights_return(const Problem& p, const Matrix& matrix, Isa isa) {
    for (size_t block = 0; block < matrix.blocks; ++block) {
        const size_t here = std::min(kRows, p.m - block * kRows), count = 1 + random(here), pitch = (p.n + kChunkTiles * kColumns - 1) / (kChunkTiles * kColumns) * kChunkTiles * kColumns;
        auto scratch = exactly<uint8_t>(pitch * kRows + p.n * 4);
        std::vector<std::vector<float>> lines(count, exactly<float>(p.n));
        std::vector<uint8_t> which;
        std::vector<void*> out;
        for (size_t i = 0; i < count; ++i) which.push_back(uint8_t(random(here))), out.push_back(lines[i].data());
        kernels_for(isa).rows(matrix, block, which.data(), count, out.data(), Float::f32, scratch.data());
        for (size_t i = 0; i < count; ++i) {
            std::vector<float> steps(p.n, 1.0f);
            for (size_t j = 0; j < p.steps.size(); ++j) steps[size_t(p.order[j])] = p.steps[j];
            for (size_t j = 0; j < p.n; ++j) {
                const int32_t level = p.levels[(block * kRows + which[i]) * p.n + j];
                const float scaled = float(level) * steps[j];
                if ((scaled == 0) != (lines[i][j] == 0)) return false;
                if (!p.half) {
                    float scale;
                    std::memcpy(&scale, p.scales.data() + 4 * ((block * matrix.groups + j / (matrix.group_tiles * kColumns)) * kRows + which[i]), 4);
                    if (lines[i][j] != scaled * scale) return false;
                }
            }
        }
        auto words = exactly<uint16_t>(p.n);
        void* to = words.data();
        kernels_for(isa).rows(matrix, block, which.data(), 1, &to, Float::bf16, scratch.data());
    }
    return true;
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 300;
    const std::vector<Isa> isas = available();
    size_t corrections = 0;
    for (unsigned round = 0; round < rounds; ++round) {
        const Problem p = make(round);
        const Built built = pack_with(p, isas[0]);
        corrections += built.corrections.size();
        const Matrix matrix = matrix_from(p, built);
        const Float type = Float(random(3));
        const std::vector<uint8_t> x = stored(p.x, type), first = multiply_with(p, matrix, x, type, isas[0]);
        for (const Isa isa : isas) {
            const Built other = pack_with(p, isa);
            if (other.codes != built.codes || other.starts != built.starts || other.corrections != built.corrections) {
                std::printf("round %u: %s packs otherwise\n", round, isa_name(isa));
                return 1;
            }
            if (multiply_with(p, matrix, x, type, isa) != first) {
                std::printf("round %u: %s multiplies to other bits\n", round, isa_name(isa));
                return 1;
            }
            if (!weights_return(p, matrix, isa)) {
                std::printf("round %u: %s gives other weights\n", round, isa_name(isa));
                return 1;
            }
            kernels_for(isa).read(built.codes.data(), built.codes.size());
        }
    }
    std::printf("%u rounds, %zu instruction sets, %zu corrections\n", rounds, isas.size(), corrections);
    return corrections ? 0 : 1;
}
