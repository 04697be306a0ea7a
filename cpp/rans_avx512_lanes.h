// Included where AVX-512 is on: sixteen lanes of rANS at a time, wherever their tables come from.

// Sixteen lanes take the words they need from the stream, in lane order.
inline __m512i refill(__m512i x, __mmask16 lanes, const uint8_t*& at) {
    const __mmask16 low = _mm512_mask_cmplt_epu32_mask(lanes, x, _mm512_set1_epi32(kLower));
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
    at += 2 * size_t(__builtin_popcount(low));
    return _mm512_or_si512(_mm512_mask_slli_epi32(x, low, x, 16), _mm512_maskz_expand_epi32(low, words));
}

// From the two candidate entries to the next state; returns the chosen entry.
template <unsigned kBits = kBucketBits> inline __m512i advance(__m512i& x, __m512i primary, __m512i alias) {
    const __mmask16 second = _mm512_cmpge_epu32_mask(_mm512_slli_epi32(x, 32 - kBits), primary);
    const __m512i entry = _mm512_mask_mov_epi32(primary, second, alias);
    const __m512i offset = _mm512_add_epi32(_mm512_and_si512(x, _mm512_set1_epi32((1 << kBits) - 1)),
                                            _mm512_maskz_srai_epi32(second, alias, kBiasShift));
    const __m512i frequency = _mm512_and_si512(entry, _mm512_set1_epi32(kFrequencyMask));
    x = _mm512_add_epi32(_mm512_mullo_epi32(frequency, _mm512_srli_epi32(x, kScaleBits)), offset);
    return entry;
}
