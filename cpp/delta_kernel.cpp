// The walks of the delta coder, compiled once per instruction set. docs/format/delta.md says what
// contexts, gaps and sizes are.
//
// With vectors a group's elements of one context are a mask: ranks are population counts, and a
// change is found by its rank without looking at the elements before it.
#include <cstring>
#include <type_traits>

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
#include <immintrin.h>
#endif

#include "delta.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the words are read as they lie");

namespace waterfill::WATERFILL_ISA {
namespace {

using namespace delta;

#include "delta_groups.h"

inline unsigned lowest(uint64_t mask) { return unsigned(__builtin_ctzll(mask)); }

template <class W, bool kSign> struct Order {
    static constexpr W kTop = W(W(1) << (8 * sizeof(W) - 1));

    // Steps from old to now in the order of values, away from zero first, in zigzag.
    static uint64_t difference(W old, W now) {
        W step;
        if constexpr (kSign) {
            const W flip = old & kTop, x = now ^ flip;
            step = W((x & kTop ? W(~x) : W(x ^ kTop)) - W(old ^ flip ^ kTop));
        } else {
            step = W(now - old);
        }
        return W(W(step << 1) ^ W(0 - W(step >> (8 * sizeof(W) - 1))));
    }

    static W moved(W old, uint64_t difference) {
        const W z = W(difference), step = W(W(z >> 1) ^ W(0 - W(z & 1)));
        if constexpr (!kSign) return W(old + step);
        const W flip = old & kTop, x = W(W(old ^ flip ^ kTop) + step);
        return W((x & kTop ? W(x ^ kTop) : W(~x)) ^ flip);
    }
};

inline unsigned symbol_of(uint64_t value) {
    const unsigned length = 64 - unsigned(__builtin_clzll(value | kDirect));
    const unsigned large = kDirect + 2 * (length - 5) + unsigned(value >> (length - 2) & 1);
    return value < kDirect ? unsigned(value) : large;
}

// Calls group(old, now, first, count) for each 64 elements; the last few come as a padded copy.
template <class W, class Group> inline void in_groups(const uint8_t* old, const uint8_t* now, size_t n, Group group) {
    const W* x = reinterpret_cast<const W*>(old);
    const W* y = reinterpret_cast<const W*>(now);
    size_t i = 0;
    for (; i + kGroup <= n; i += kGroup) group(x + i, y + i, i, kGroup);
    if (i == n) return;
    W a[kGroup] = {}, b[kGroup] = {};
    std::memcpy(a, x + i, (n - i) * sizeof(W));
    std::memcpy(b, y + i, (n - i) * sizeof(W));
    group(a, b, i, unsigned(n - i));
}

template <class W, bool kSign>
void survey(const Words& how, const uint8_t* old, const uint8_t* now, size_t n, size_t every, int64_t* elements, int64_t* sizes) {
    const unsigned symbols = how.size_symbols();
    uint8_t exponent[kGroup];
    in_groups<W>(old, now, n, [&](const W* x, const W* y, size_t first, unsigned count) {
        if (first / kRun % every) return;
        exponents_of(x, how, exponent);
        for (unsigned i = 0; i < count; ++i) ++elements[exponent[i]];
        for (uint64_t changed = differing(x, y) & lanes(count); changed; changed &= changed - 1) {
            const unsigned i = lowest(changed);
            ++sizes[exponent[i] * symbols + symbol_of(Order<W, kSign>::difference(x[i], y[i]) - 1)];
        }
    });
}

inline bool at_ends(const Contexts& contexts, const Run* runs) {
    for (unsigned k = 0; k < contexts.count; ++k)
        if (runs[k].at != runs[k].end) return false;
    return true;
}

struct Lookup {
    uint8_t context[256];
    explicit Lookup(const Contexts& contexts) {
        unsigned k = 0;
        for (unsigned e = 0; e < 256; ++e) {
            while (k + 1 < contexts.count && contexts.first[k] <= e) ++k;
            context[e] = uint8_t(k);
        }
    }
};

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)

// The elements of each context of a group.
template <class W> inline void masks_of(const W* x, const Words& how, const Contexts& contexts, uint64_t all, uint64_t* masks) {
    const auto exponent = exponents(x, how);
    uint64_t reached = all;
    for (unsigned k = 0; k + 1 < contexts.count; ++k) {
        const uint64_t above = exponent.at_least(contexts.first[k]) & all;
        masks[k] = reached ^ above;
        reached = above;
    }
    masks[contexts.count - 1] = reached;
}

template <class W, bool kSign>
size_t find(const Words& how, const Contexts& contexts, const uint8_t* old, const uint8_t* now, size_t n, Change* out) {
    const Lookup lookup(contexts);
    uint32_t since[kMaxContexts] = {};
    uint64_t masks[kMaxContexts];
    Change* at = out;
    in_groups<W>(old, now, n, [&](const W* x, const W* y, size_t, unsigned count) {
        const uint64_t all = lanes(count);
        masks_of(x, how, contexts, all, masks);
        for (uint64_t left = differing(x, y) & all; left; left &= left - 1) {
            const unsigned i = lowest(left), k = lookup.context[exponent_of(x[i], how)];
            const uint32_t rank = uint32_t(__builtin_popcountll(masks[k] & ((uint64_t(1) << i) - 1)));
            *at++ = {Order<W, kSign>::difference(x[i], y[i]) - 1, since[k] + rank, k};
            since[k] = 0 - (rank + 1);
        }
        for (unsigned k = 0; k < contexts.count; ++k) since[k] += uint32_t(__builtin_popcountll(masks[k]));
    });
    return size_t(at - out);
}

template <class W, bool kSign>
bool apply(const Words& how, const Contexts& contexts, const uint8_t* old, uint8_t* out, size_t n, Run* runs) {
    uint32_t until[kMaxContexts];
    uint64_t masks[kMaxContexts];
    for (unsigned k = 0; k < contexts.count; ++k) until[k] = runs[k].at->gap;
    in_groups<W>(old, old, n, [&](const W* x, const W*, size_t first, unsigned count) {
        uint8_t* to = out + first * sizeof(W);
        if (to != reinterpret_cast<const uint8_t*>(x)) std::memcpy(to, x, count * sizeof(W));
        masks_of(x, how, contexts, lanes(count), masks);
        // Which contexts have a change here, and how many, is as good as random: few branches ask.
        uint32_t touched = 0;
        for (unsigned k = 0; k < contexts.count; ++k) {
            until[k] -= uint32_t(__builtin_popcountll(masks[k]));
            touched |= (until[k] >> 31) << k;
        }
        while (touched) {
            uint32_t again = 0;
            for (; touched; touched &= touched - 1) {
                const unsigned k = lowest(touched);
                const uint32_t left = until[k], rank = left + uint32_t(__builtin_popcountll(masks[k]));
                const unsigned i = lowest(_pdep_u64(uint64_t(1) << rank, masks[k]));
                const Change* change = runs[k].at++;
                const W word = Order<W, kSign>::moved(x[i], change->size + 1);
                std::memcpy(to + i * sizeof(W), &word, sizeof(W));
                until[k] = left + 1 + change[1].gap;
                again |= (until[k] >> 31) << k;
            }
            touched = again;
        }
    });
    return at_ends(contexts, runs);
}

#else

template <class W, bool kSign>
size_t find(const Words& how, const Contexts& contexts, const uint8_t* old, const uint8_t* now, size_t n, Change* out) {
    const Lookup lookup(contexts);
    uint32_t since[kMaxContexts] = {};
    uint8_t exponent[kGroup];
    Change* at = out;
    in_groups<W>(old, now, n, [&](const W* x, const W* y, size_t, unsigned count) {
        exponents_of(x, how, exponent);
        for (unsigned i = 0; i < count; ++i) {
            const unsigned k = lookup.context[exponent[i]];
            if (x[i] == y[i]) {
                ++since[k];
            } else {
                *at++ = {Order<W, kSign>::difference(x[i], y[i]) - 1, since[k], k};
                since[k] = 0;
            }
        }
    });
    return size_t(at - out);
}

template <class W, bool kSign>
bool apply(const Words& how, const Contexts& contexts, const uint8_t* old, uint8_t* out, size_t n, Run* runs) {
    const Lookup lookup(contexts);
    uint32_t until[kMaxContexts];
    for (unsigned k = 0; k < contexts.count; ++k) until[k] = runs[k].at->gap;
    uint8_t exponent[kGroup];
    in_groups<W>(old, old, n, [&](const W* x, const W*, size_t first, unsigned count) {
        uint8_t* to = out + first * sizeof(W);
        if (to != reinterpret_cast<const uint8_t*>(x)) std::memcpy(to, x, count * sizeof(W));
        exponents_of(x, how, exponent);
        for (unsigned i = 0; i < count; ++i) {
            const unsigned k = lookup.context[exponent[i]];
            if (until[k]-- == 0) {
                const Change* change = runs[k].at++;
                const W word = Order<W, kSign>::moved(x[i], change->size + 1);
                std::memcpy(to + i * sizeof(W), &word, sizeof(W));
                until[k] = change[1].gap;
            }
        }
    });
    return at_ends(contexts, runs);
}

#endif

// Calls run(word, has_sign) with a word of the right width.
template <class Run> inline auto of_width(const Words& how, Run run) {
    const auto signs = [&](auto word) { return how.has_sign ? run(word, std::integral_constant<bool, true>()) : run(word, std::integral_constant<bool, false>()); };
    switch (how.width) {
        case 1: return signs(uint8_t());
        case 2: return signs(uint16_t());
        case 4: return signs(uint32_t());
        default: return signs(uint64_t());
    }
}

void survey_any(const Words& how, const uint8_t* old, const uint8_t* now, size_t n, size_t every, int64_t* elements, int64_t* sizes) {
    of_width(how, [&](auto word, auto sign) { survey<decltype(word), sign.value>(how, old, now, n, every, elements, sizes); });
}

size_t find_any(const Words& how, const Contexts& contexts, const uint8_t* old, const uint8_t* now, size_t n, Change* out) {
    return of_width(how, [&](auto word, auto sign) { return find<decltype(word), sign.value>(how, contexts, old, now, n, out); });
}

bool apply_any(const Words& how, const Contexts& contexts, const uint8_t* old, uint8_t* out, size_t n, Run* runs) {
    return of_width(how, [&](auto word, auto sign) { return apply<decltype(word), sign.value>(how, contexts, old, out, n, runs); });
}

const Kernels kTable{survey_any, find_any, apply_any};

}  // namespace

const delta::Kernels& delta_kernels() { return kTable; }

}  // namespace waterfill::WATERFILL_ISA
