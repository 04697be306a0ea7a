// Making coded matrices from levels: what their models are made from. Compiled once, for the baseline
// instruction set; the fuzz driver includes it too.
#pragma once
#include <cstdlib>
#include <mutex>
#include <type_traits>

#include "coded_matrix.h"

namespace waterfill::coded {

// Levels (m, n) of any width, as points of two grids: where there is one state, all are on the even one.
struct Source {
    const void* at;
    unsigned width;
    size_t m, n;
    bool plain;

    // use(levels as they lie, what a level is multiplied by)
    template <class Use> void as_stored(Use use) const {
        const int32_t times = plain ? 2 : 1;
        if (width == 1) use(static_cast<const int8_t*>(at), times);
        else if (width == 2) use(static_cast<const int16_t*>(at), times);
        else use(static_cast<const int32_t*>(at), times);
    }
};

// Work on some rows at a time: work(first, last).
template <class Work> void each_rows(size_t rows, size_t together, unsigned threads, Work work) {
    pool::run((rows + together - 1) / together, threads, [&](size_t part) { work(part * together, std::min(rows, (part + 1) * together)); });
}

// Sums of squared levels: of each column, exactly; of each row, columns weighted.
inline void power(const Source& source, const float* weights, int64_t* columns, double* rows, unsigned threads) {
    constexpr int32_t kMost = 1 << 15;  // so that sums over 2^31 rows fit
    const size_t n = source.n;
    std::mutex guard;
    std::fill(columns, columns + n, 0);
    source.as_stored([&](const auto* levels, int32_t times) {
        using Sum = std::conditional_t<sizeof(*levels) == 1, int32_t, int64_t>;
        each_rows(source.m, 256, threads, [&](size_t first, size_t last) {
            std::vector<Sum> sums(n);
            for (size_t i = first; i < last; ++i) {
                const auto* row = levels + i * n;
                constexpr size_t kParts = 16;
                float part[kParts] = {};
                const auto add = [&](size_t j, float& to) {
                    const int32_t size = std::min(std::abs(int32_t(row[j])) * times, kMost);
                    sums[j] += Sum(size) * Sum(size);
                    to += float(size) * float(size) * weights[j];
                };
                size_t j = 0;
                for (; j + kParts <= n; j += kParts)
                    for (size_t k = 0; k < kParts; ++k) add(j + k, part[k]);
                for (; j < n; ++j) add(j, part[0]);
                double sum = 0;
                for (float one : part) sum += one;
                rows[i] = sum;
            }
            std::lock_guard<std::mutex> lock(guard);
            for (size_t j = 0; j < n; ++j) columns[j] += sums[j];
        });
    });
}

// How positions and levels of scale were given out.
struct Plan {
    const uint16_t* order;
    const uint8_t *row_levels, *panel_levels;
};

// Occurrences of (q >> coarse, grid) by level of scale: counts[level][128 + 2 * q + grid], q from -64 to 63, those
// beyond at the ends. `coarse` is of each level.
inline void count(const Source& source, const Plan& plan, const uint8_t* coarse, size_t levels, int64_t* counts, unsigned threads) {
    std::mutex guard;
    std::fill(counts, counts + levels * 256, 0);
    source.as_stored([&](const auto* stored, int32_t times) {
        each_rows(source.m, 128, threads, [&](size_t first_row, size_t last_row) {
            // Two tables, so that a run of one value does not wait for its own last increment.
            std::vector<uint32_t> mine(2 * levels * 256);
            for (size_t i = first_row; i < last_row; ++i)
                for (size_t first = 0; first < source.n; first += kLanes) {
                    const auto* row = stored + i * source.n;
                    const size_t scale = size_t(plan.row_levels[i]) + plan.panel_levels[first / kLanes], end = std::min(source.n, first + kLanes);
                    uint32_t* const of = mine.data() + scale * 512 + 128;
                    if (sizeof(*row) == 1 && times == 1 && coarse[scale] == 0) {
                        for (size_t p = first; p < end; ++p) ++of[ptrdiff_t(p % 2 * 256) + row[plan.order[p]]];
                        continue;
                    }
                    for (size_t p = first; p < end; ++p) {
                        const int32_t l = row[plan.order[p]] * times, q = std::clamp((l >> 1) >> coarse[scale], -64, 63);
                        ++of[ptrdiff_t(p % 2 * 256) + 2 * q + (l & 1)];
                    }
                }
            std::lock_guard<std::mutex> lock(guard);
            for (size_t k = 0; k < levels; ++k)
                for (size_t bin = 0; bin < 256; ++bin) counts[k * 256 + bin] += mine[k * 512 + bin] + mine[k * 512 + 256 + bin];
        });
    });
}

}  // namespace waterfill::coded
