// Attention over a cache, between Python and the kernels.
#include <nanobind/stl/array.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "bind_arrays.h"
#include "cache_run.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

using Strides = std::array<ptrdiff_t, 4>;
// start, tokens, keys, their strides, values, their strides
using ExactArgs = std::tuple<int64_t, size_t, uintptr_t, Strides, uintptr_t, Strides>;
// kept, bytes of a block, mean, places, rows, scales, groups of bits and how many components
using StreamArgs = std::tuple<size_t, size_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, std::vector<std::tuple<unsigned, size_t>>>;
// pairs, first and second columns, frequencies
using TurnArgs = std::tuple<size_t, uintptr_t, uintptr_t, uintptr_t>;
// keys, bytes between rows, values, bytes between rows, blocks
using RunArgs = std::tuple<uintptr_t, ptrdiff_t, uintptr_t, ptrdiff_t, size_t>;
// start, offsets, rows
using OffsetArgs = std::tuple<int64_t, uintptr_t, size_t>;
// start, hidden tokens, keys, values, turn, runs of blocks, offsets of positions
using CodedArgs = std::tuple<int64_t, size_t, StreamArgs, StreamArgs, TurnArgs, std::vector<RunArgs>, std::vector<OffsetArgs>>;

template <class T> T* at(uintptr_t address) {
    if (!address) throw std::invalid_argument("cache: no memory at null");
    return reinterpret_cast<T*>(address);
}

attention::Tensor tensor_of(uintptr_t address, const Strides& strides) {
    if (strides[3] != 1) throw std::invalid_argument("cache: the last dimension is contiguous");
    return {at<const void>(address), {strides[0], strides[1], strides[2]}};
}

// A stream, and the components that it points at.
struct OwnedStream {
    std::vector<cache::Component> components;
    std::vector<uint32_t> first;
    cache::Stream stream;

    OwnedStream(const StreamArgs& args, size_t heads, size_t width) : first(heads + 1) {
        const auto& [kept, nbytes, mean, places, rows, scales, groups] = args;
        if (!kept || kept > width) throw std::invalid_argument("cache: components are at least one and at most a head's width");
        size_t count = 0, end = 0;
        for (const auto& [bits, n] : groups) {
            if (bits < 1 || bits > 8) throw std::invalid_argument("cache: codes have 1 to 8 bits");
            count += n, end += n * bits * cache::kBlock / 8;
        }
        if (end != nbytes || end > UINT32_MAX) throw std::invalid_argument("cache: blocks are not as long as their components");
        const int32_t* place = reinterpret_cast<const int32_t*>(places);
        for (size_t i = 0; i < count; ++i) {
            if (place[i] < 0 || size_t(place[i]) >= heads * kept) throw std::invalid_argument("cache: no such component");
            if (++first[size_t(place[i]) / kept + 1] > kept) throw std::invalid_argument("cache: more components than are kept");
        }
        for (size_t h = 0; h < heads; ++h) first[h + 1] += first[h];
        std::vector<uint32_t> next(first.begin(), first.end() - 1);
        components.resize(count);
        uint32_t row = 0, offset = 0;
        for (const auto& [bits, n] : groups)
            for (size_t i = 0; i < n; ++i, ++row, offset += uint32_t(bits * cache::kBlock / 8)) components[next[size_t(place[row]) / kept]++] = {row, offset, bits};
        stream = {kept, width, at<const uint16_t>(mean), reinterpret_cast<const int8_t*>(rows), reinterpret_cast<const uint16_t*>(scales), components.data(), first.data()};
    }
    OwnedStream(const OwnedStream&) = delete;
};

struct OwnedCoded {
    OwnedStream keys, values;
    cache::Turning turning;
    cache::Coded coded;

    OwnedCoded(const CodedArgs& args, const attention::Call& call)
        : keys(std::get<2>(args), call.shared, call.key_width), values(std::get<3>(args), call.shared, call.value_width), turning(turning_of(std::get<4>(args), call.key_width)) {
        coded.start = std::get<0>(args), coded.hidden = std::get<1>(args);
        coded.keys = keys.stream, coded.values = values.stream, coded.turning = &turning;
        const size_t key_nbytes = std::get<1>(std::get<2>(args)), value_nbytes = std::get<1>(std::get<3>(args));
        for (const auto& [k, key_row, v, value_row, blocks] : std::get<5>(args))
            for (size_t b = 0; b < blocks; ++b) coded.blocks.push_back({reinterpret_cast<const uint8_t*>(k) + b * key_nbytes, reinterpret_cast<const uint8_t*>(v) + b * value_nbytes, key_row, value_row});
        if (coded.blocks.empty() || coded.hidden >= cache::kBlock) throw std::invalid_argument("cache: a piece that shows no block, or not its first");
        const int64_t end = coded.start + int64_t(coded.blocks.size() * cache::kBlock);
        for (const auto& [start, offsets, rows] : std::get<6>(args)) {
            const bool begins = coded.offsets.empty() ? start == coded.start : start > coded.offsets.back().start && start < end;
            if (!begins || (start - coded.start) % int64_t(cache::kBlock) || (rows != 1 && rows != call.batch))
                throw std::invalid_argument("cache: positions change with a block, for all rows or each");
            coded.offsets.push_back({start, at<const int64_t>(offsets), rows});
        }
        if (coded.offsets.empty()) throw std::invalid_argument("cache: blocks without positions");
    }
    OwnedCoded(const OwnedCoded&) = delete;

    static cache::Turning turning_of(const TurnArgs& args, size_t width) {
        const auto& [pairs, first, second, frequencies] = args;
        return cache::Turning(pairs, pairs ? at<const int64_t>(first) : nullptr, pairs ? at<const int64_t>(second) : nullptr, pairs ? at<const double>(frequencies) : nullptr, width);
    }
};

void attend_cache(const std::array<size_t, 6>& shape, const char* type, uintptr_t q, const Strides& q_strides, uintptr_t mask, const Strides& mask_strides, bool boolean,
                  int64_t first_masked, int64_t masked, float scale, const std::vector<ExactArgs>& exact_args, const std::vector<CodedArgs>& coded_args, uintptr_t out,
                  unsigned threads) {
    attention::Call call{shape[0], shape[1], shape[2], shape[3], 1, shape[4], shape[5], float_named(type), {}, {}, {}, {}, scale, at<void>(out)};
    if (!call.batch || !call.queries || !call.shared || !call.heads || call.heads % call.shared) throw std::invalid_argument("cache: query heads are no multiple of key heads");
    if (!call.key_width || !call.value_width || call.key_width > attention::kMaxWidth || call.value_width > attention::kMaxWidth)
        throw std::invalid_argument("cache: heads are 1 to 512 wide");
    call.q = tensor_of(q, q_strides);
    call.mask = {!mask ? attention::MaskKind::none : boolean ? attention::MaskKind::boolean : attention::MaskKind::added,
                 reinterpret_cast<const void*>(mask),
                 {mask_strides[0], mask_strides[1], mask_strides[2], mask_strides[3]}};
    const auto within = [&](int64_t start, int64_t stop) {
        if (mask && stop > first_masked && (start < first_masked || stop > first_masked + masked)) throw std::invalid_argument("cache: the mask ends before the keys, or begins among them");
    };
    std::vector<cache::Exact> exact;
    for (const auto& [start, count, k, k_strides, v, v_strides] : exact_args) {
        within(start, start + int64_t(count));
        exact.push_back({start, count, tensor_of(k, k_strides), tensor_of(v, v_strides)});
    }
    std::vector<std::unique_ptr<OwnedCoded>> owned;
    std::vector<cache::Coded> coded;
    for (const CodedArgs& args : coded_args) {
        owned.push_back(std::make_unique<OwnedCoded>(args, call));
        const cache::Coded& made = owned.back()->coded;
        within(made.start + int64_t(made.hidden), made.start + int64_t(made.blocks.size() * cache::kBlock));
        coded.push_back(made);
    }
    const Isa isa = chosen_isa();
    nb::gil_scoped_release release;
    cache::Run(call, exact, coded, first_masked)(threads, isa);
}

}  // namespace

void bind_cache(nb::module_& m) {
    m.def("attend_cache", &attend_cache, "shape"_a, "dtype"_a, "q"_a, "q_strides"_a, "mask"_a, "mask_strides"_a, "boolean"_a, "first_masked"_a, "masked"_a, "scale"_a, "exact"_a,
          "coded"_a, "out"_a, "threads"_a,
          "Attention over pieces at addresses; shape is batch, heads, key heads, queries, widths of a key and of a value.");
}
