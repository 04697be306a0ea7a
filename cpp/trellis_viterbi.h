// Included by trellis_kernel.cpp, inside its namespace: the Viterbi algorithm with the states in
// vector registers.
//
// With u = next ^ (feedback, where the grid is 1) ^ (input, where k is odd), the state before is
// 2 u + grid (mod states): the lower half of the new states comes from the even old ones, the upper
// half from the odd ones, each in an order that exclusive-or permutes. Both are shuffles that the
// compiler knows, so a row costs two shuffles, two additions and a comparison per vector.

template <unsigned W> struct Lanes;
template <> struct Lanes<4> {
    typedef float V __attribute__((vector_size(16)));
    typedef int32_t M __attribute__((vector_size(16)));
};
template <> struct Lanes<8> {
    typedef float V __attribute__((vector_size(32)));
    typedef int32_t M __attribute__((vector_size(32)));
};

#if defined(WATERFILL_ISA_avx2) || defined(WATERFILL_ISA_avx512)
constexpr unsigned kWidth = 8;
#else
constexpr unsigned kWidth = 4;
#endif

inline unsigned signs(Lanes<4>::M m) {
#ifdef __SSE2__
    return unsigned(_mm_movemask_ps((__m128)m));
#else
    return (m[0] & 1) | (m[1] & 2) | (m[2] & 4) | (m[3] & 8);
#endif
}
#ifdef __AVX2__
inline unsigned signs(Lanes<8>::M m) { return unsigned(_mm256_movemask_ps((__m256)m)); }
#endif

constexpr TrellisCode code_of(unsigned states) {
    for (const TrellisCode& code : kTrellisCodes)
        if (code.states == states) return code;
    return {};
}

template <unsigned S> class Viterbi {
    static constexpr unsigned W = S < kWidth ? S : kWidth, R = S / W, kTop = S / 2;
    static constexpr unsigned kFeedback = code_of(S).feedback, kInput = code_of(S).input;
    typedef typename Lanes<W>::V V;
    typedef typename Lanes<W>::M M;

    static constexpr unsigned before(unsigned next, unsigned parity) {
        const unsigned grid = next >= kTop;
        return ((next ^ (grid ? kFeedback : 0) ^ (parity ? kInput : 0)) << 1 | grid) & (S - 1);
    }

    // Costs of the states before those of register r, reached by this parity.
    template <unsigned Parity, unsigned First, size_t... I>
    static V gather(const V (&old)[R], std::index_sequence<I...>) {
        // The states before W neighbouring ones lie in two neighbouring registers (or in one).
        constexpr unsigned pair = R == 1 ? 0 : before(First, Parity) / (2 * W) * 2;
        return __builtin_shufflevector(old[pair], old[R == 1 ? 0 : pair + 1],
                                       (before(First + unsigned(I), Parity) - pair * W)...);
    }

    template <unsigned Reg>
    static void advance(const V (&old)[R], V (&now)[R], const float (&price)[4], uint8_t* decision) {
        constexpr unsigned first = Reg * W;
        const V even = by_grid<Reg>(price[0], price[2]), odd = by_grid<Reg>(price[1], price[3]);
        const V a = gather<0, first>(old, std::make_index_sequence<W>()) + even;
        const V b = gather<1, first>(old, std::make_index_sequence<W>()) + odd;
        const M second = b < a;
        now[Reg] = second ? b : a;
        const unsigned bits = signs(second);
        if constexpr (W == 8) decision[Reg] = uint8_t(bits);
        else if constexpr (Reg % 2 == 0) decision[Reg / 2] = uint8_t(bits);
        else decision[Reg / 2] = uint8_t(decision[Reg / 2] | bits << 4);
    }

    // A register of few states holds both grids: its costs differ by lane.
    template <unsigned Reg> static V by_grid(float lower, float upper) {
        if constexpr (R > 1) return V{} + (Reg * W < kTop ? lower : upper);
        return select(std::make_index_sequence<W>()) ? V{} + lower : V{} + upper;
    }
    template <size_t... I> static M select(std::index_sequence<I...>) { return M{(I < kTop ? -1 : 0)...}; }

    template <size_t... Reg>
    static void step(V (&cost)[R], const float (&price)[4], uint8_t* decision, std::index_sequence<Reg...>) {
        V now[R];
        (advance<Reg>(cost, now, price, decision), ...);
        for (unsigned r = 0; r < R; ++r) cost[r] = now[r];
    }

public:
    static constexpr size_t kBytes = S < 8 ? 1 : S / 8;  // decisions of a row

    // prices: [grid << 1 | parity][stride], n rows. Leaves the best path's in `kind`.
    static void run(const float* prices, size_t stride, size_t n, uint8_t* decisions, uint8_t* kind) {
        V cost[R];
        for (unsigned s = 0; s < S; ++s) cost[s / W][s % W] = s ? 1e30f : 0.0f;
        for (size_t r = 0; r < n; ++r) {
            const float price[4] = {prices[r], prices[stride + r], prices[2 * stride + r], prices[3 * stride + r]};
            step(cost, price, decisions + kBytes * r, std::make_index_sequence<R>());
            // Keep the accumulated cost small, so that float32 still tells neighbours apart.
            if ((r & 63) == 63) {
                float low = cost[0][0];
                for (unsigned s = 1; s < S; ++s) low = cost[s / W][s % W] < low ? cost[s / W][s % W] : low;
                for (unsigned i = 0; i < R; ++i) cost[i] -= low;
            }
        }
        unsigned state = 0;
        for (unsigned s = 1; s < S; ++s)
            if (cost[s / W][s % W] < cost[state / W][state % W]) state = s;
        for (size_t r = n; r-- > 0;) {
            const unsigned parity = decisions[kBytes * r + state / 8] >> (state % 8) & 1;
            const unsigned grid = state / kTop;
            kind[r] = uint8_t(grid << 1 | parity);
            state = ((state ^ (kFeedback & (0 - grid)) ^ (kInput & (0 - parity))) << 1 | grid) & (S - 1);
        }
    }
};
