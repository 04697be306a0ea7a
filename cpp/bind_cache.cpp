// Attention over a cache, between Python and the kernels.
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>

#include "bind_arrays.h"
#include "bind_rans.h"
#include "cache_run.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace waterfill;

namespace {

using Strides = std::array<ptrdiff_t, 4>;
// start, tokens, keys, their strides, values, their strides
using ExactArgs = std::tuple<int64_t, size_t, uintptr_t, Strides, uintptr_t, Strides>;
// An address, and bytes between rows of the batch.
using PartArgs = std::tuple<uintptr_t, ptrdiff_t>;
// blocks, their parts
using RunArgs = std::tuple<size_t, std::vector<PartArgs>>;
// start, offsets, rows
using OffsetArgs = std::tuple<int64_t, uintptr_t, size_t>;
// start, hidden tokens, coder, runs of blocks, offsets of positions
using CodedArgs = std::tuple<int64_t, size_t, nb::object, std::vector<RunArgs>, std::vector<OffsetArgs>>;

template <class T> using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// kept, mean, rows, scales
using TableArgs = std::tuple<size_t, Matrix<uint16_t>, Matrix<int8_t>, Vector<const uint16_t>>;
// place, groups of bits and how many components
using WholeArgs = std::tuple<TableArgs, Vector<const int32_t>, std::vector<std::pair<unsigned, size_t>>>;
// shifts and models of components, pulls of the models in use, classes of plain bits
using ColumnArgs = std::tuple<Vector<const uint8_t>, Vector<const uint8_t>, Vector<const uint8_t>, size_t>;

template <class T> T* at(uintptr_t address) {
    if (!address) throw std::invalid_argument("cache: no memory at null");
    return reinterpret_cast<T*>(address);
}

attention::Tensor tensor_of(uintptr_t address, const Strides& strides) {
    if (strides[3] != 1) throw std::invalid_argument("cache: the last dimension is contiguous");
    return {at<const void>(address), {strides[0], strides[1], strides[2]}};
}

template <class T> std::vector<T> copied(const Vector<const T>& x) { return {x.data(), x.data() + x.shape(0)}; }

void make_turning(cache::Turning* made, const Vector<const int64_t>& first, const Vector<const int64_t>& second, const Vector<const double>& frequencies) {
    new (made) cache::Turning(copied(first), copied(second), copied(frequencies));
}

cache::Tables tables_of(const TableArgs& args) {
    const auto& [kept, mean, rows, scales] = args;
    cache::require(rows.shape(1) == mean.shape(1) && scales.shape(0) == rows.shape(0), "means, rows and scales do not fit each other");
    return {mean.shape(0), kept, mean.shape(1), mean.data(), rows.data(), scales.data()};
}

// The caller's memory stays as long as the coder: `owner` of a call has it.
cache::Coder* whole(const WholeArgs& keys, const WholeArgs& values, const Vector<const float>& gains, const cache::Turning& turn, const nb::object&) {
    cache::require(gains.shape(0) == cache::kGains, "tokens have one of eight gains");
    const auto recipe = [](const WholeArgs& args) {
        const auto& [tables, place, groups] = args;
        size_t count = 0;
        for (const auto& [bits, n] : groups) cache::require(n <= place.shape(0) - count, "more components than places"), count += n;
        cache::require(count == place.shape(0) && std::get<2>(tables).shape(0) == count, "components, their places and rows differ in number");
        static constexpr int32_t none[1] = {};
        return cache::Recipe{tables_of(tables), 0, count ? place.data() : none, groups};
    };
    std::unique_ptr<cache::Coder> made(new cache::Coder{cache::Kind::whole, recipe(keys), recipe(values), &turn, {}, gains.data()});
    const cache::Reading reading(*made);
    const auto gains_nbytes = [](const cache::Recipe& r) { return r.tables.heads * cache::kBlock / 8 * cache::kGainBits; };
    made->nbytes = {reading.keys.nbytes, gains_nbytes(made->keys), reading.values.nbytes, gains_nbytes(made->values)};
    return made.release();
}

cache::Coder* steps(const TableArgs& keys, const TableArgs& values, const cache::Turning& turn, const ColumnArgs& columns, const RansModels& known, double step, const Vector<const double>& ratios, size_t nbytes,
                    const nb::object&) {
    const auto& [shifts, models, pulls, plain] = columns;
    const auto recipe = [](const TableArgs& args) {
        const cache::Tables tables = tables_of(args);
        cache::require(std::get<2>(args).shape(0) == tables.heads * tables.kept, "components and their rows differ in number");
        return cache::Recipe{tables, 0, nullptr, {}};
    };
    cache::require(ratios.shape(0) == 256, "a step for each byte");
    cache::require(known.alphabet <= rans::kBuckets && plain < known.classes && plain < 8, "symbols of a component are 32 at most");
    const size_t of_keys = std::get<2>(keys).shape(0), of_values = std::get<2>(values).shape(0);
    cache::require(shifts.shape(0) == of_keys + of_values && models.shape(0) == of_keys + of_values, "components and their columns differ in number");
    std::unique_ptr<cache::Coder> made(new cache::Coder{cache::Kind::steps, recipe(keys), recipe(values), &turn, {nbytes}});
    made->symbols.reset(new cache::SymbolTables{of_keys, of_values, shifts.data(), models.data(), pulls.data(), pulls.shape(0), &known.decoder, known.classes, plain, step, ratios.data()});
    const cache::Reading checked(*made);
    return made.release();
}

cache::Coder* grids(bool by_channel, size_t heads, size_t key_width, size_t value_width, unsigned key_bits, unsigned value_bits, size_t groups, const Vector<const float>& sizes, const cache::Turning& turn) {
    cache::require(groups && cache::kBlock % groups == 0 && sizes.shape(0) == 256, "grids do not fit a block");
    cache::require(key_bits > 0 && value_bits > 0, "codes have 1 to 8 bits");
    const auto recipe = [&](size_t width, unsigned bits) { return cache::Recipe{{heads, width, width, nullptr, nullptr, nullptr}, bits, nullptr, {}}; };
    std::unique_ptr<cache::Coder> made(
        new cache::Coder{by_channel ? cache::Kind::channel : cache::Kind::token, recipe(key_width, key_bits), recipe(value_width, value_bits), &turn, {}, sizes.data(), groups});
    const cache::Reading reading(*made);
    const size_t key_grids = by_channel ? heads * key_width : 2 * heads * cache::kBlock, value_grids = by_channel ? heads * groups : 2 * heads * cache::kBlock;
    made->nbytes = {reading.keys.nbytes, key_grids, key_grids, reading.values.nbytes, value_grids, value_grids};
    return made.release();
}

cache::Coder* plain(size_t heads, size_t key_width, size_t value_width, const char* format, const cache::Turning& still) {
    const auto recipe = [&](size_t width) { return cache::Recipe{{heads, width, width, nullptr, nullptr, nullptr}, 0, nullptr, {}}; };
    std::unique_ptr<cache::Coder> made(new cache::Coder{cache::Kind::plain, recipe(key_width), recipe(value_width), &still, {}});
    made->format = float_named(format);
    const cache::Reading checked(*made);
    const size_t each = heads * cache::kBlock * (made->format == Float::f32 ? 4 : 2);
    made->nbytes = {each * key_width, each * value_width};
    return made.release();
}

// Pieces of a call, and what their blocks point at.
struct OwnedCoded {
    std::vector<std::vector<ptrdiff_t>> rows;
    cache::Coded coded;

    OwnedCoded(const CodedArgs& args, const attention::Call& call) {
        const auto& [start, hidden, object, runs, offsets] = args;
        const cache::Coder& coder = nb::cast<const cache::Coder&>(object);
        const cache::Tables &keys = coder.keys.tables, &values = coder.values.tables;
        cache::require(keys.width == call.key_width && values.width == call.value_width && keys.heads == call.shared && values.heads == call.shared, "blocks of other heads than the call's");
        coded.start = start, coded.hidden = hidden, coded.coder = &coder;
        for (const auto& [blocks, parts] : runs) {
            cache::require(parts.size() == coder.nbytes.size(), "blocks of other parts than their coder's");
            std::vector<ptrdiff_t>& own = rows.emplace_back();
            for (const auto& [address, row] : parts) own.push_back(row);
            for (size_t b = 0; b < blocks; ++b) {
                cache::Block block{{}, own.data()};
                for (size_t i = 0; i < parts.size(); ++i) block.parts[i] = coder.nbytes[i] ? at<const uint8_t>(std::get<0>(parts[i])) + b * coder.nbytes[i] : nullptr;
                coded.blocks.push_back(block);
            }
        }
        cache::require(!coded.blocks.empty() && hidden < cache::kBlock, "a piece that shows no block, or not its first");
        const int64_t end = coded.start + int64_t(coded.blocks.size() * cache::kBlock);
        for (const auto& [from, address, count] : offsets) {
            const bool begins = coded.offsets.empty() ? from == coded.start : from > coded.offsets.back().start && from < end;
            cache::require(begins && (from - coded.start) % int64_t(cache::kBlock) == 0 && (count == 1 || count == call.batch), "positions change with a block, for all rows or each");
            coded.offsets.push_back({from, at<const int64_t>(address), count});
        }
        cache::require(!coded.offsets.empty(), "blocks without positions");
    }
    OwnedCoded(const OwnedCoded&) = delete;
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
    nb::class_<cache::Turning>(m, "CacheTurn", nb::is_weak_referenceable(), "Pairs of columns that turn by their frequency for each token.")
        .def("__init__", &make_turning, "first"_a, "second"_a, "frequencies"_a);
    nb::class_<cache::Coder>(m, "CacheCoder")
        .def_ro("nbytes", &cache::Coder::nbytes, "Bytes of each part of a block.")
        .def_prop_ro("held_nbytes", &cache::Coder::held_nbytes, "Bytes of itself; what it reads is its owner's.");
    m.def("cache_whole", &whole, "keys"_a.noconvert(), "values"_a.noconvert(), "gains"_a.noconvert(), "turn"_a, "owner"_a, nb::keep_alive<0, 3>(), nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>(),
          "Blocks of whole bits and gains of tokens, of keys and of values.");
    m.def("cache_steps", &steps, "keys"_a.noconvert(), "values"_a.noconvert(), "turn"_a, "columns"_a.noconvert(), "models"_a, "step"_a, "ratios"_a.noconvert(), "nbytes"_a, "owner"_a, nb::keep_alive<0, 3>(),
          nb::keep_alive<0, 5>(), nb::keep_alive<0, 7>(), nb::keep_alive<0, 9>(), "Blocks of entropy-coded steps, in one part.");
    m.def("cache_plain", &plain, "heads"_a, "key_width"_a, "value_width"_a, "dtype"_a, "still"_a, nb::keep_alive<0, 5>(), "Blocks of numbers as they are, (head, column, token).");
    m.def("cache_grids", &grids, "by_channel"_a, "heads"_a, "key_width"_a, "value_width"_a, "key_bits"_a, "value_bits"_a, "groups"_a, "sizes"_a.noconvert(), "turn"_a, nb::keep_alive<0, 8>(),
          nb::keep_alive<0, 9>(), "Blocks of integers on grids: codes, and two numbers of a grid, of keys and of values.");
    m.def("attend_cache", &attend_cache, "shape"_a, "dtype"_a, "q"_a, "q_strides"_a, "mask"_a, "mask_strides"_a, "boolean"_a, "first_masked"_a, "masked"_a, "scale"_a, "exact"_a,
          "coded"_a, "out"_a, "threads"_a,
          "Attention over pieces at addresses; shape is batch, heads, key heads, queries, widths of a key and of a value.");
}
