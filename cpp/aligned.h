// Arrays that begin at a cache line, so that a vector never lies across two.
#pragma once
#include <algorithm>
#include <cstddef>
#include <memory>
#include <new>

namespace waterfill {

template <class T> class Aligned {
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(T* at) const { ::operator delete(at, kLine); }
    };

public:
    explicit Aligned(size_t size) : at_(static_cast<T*>(::operator new(size * sizeof(T), kLine))) { std::fill_n(at_.get(), size, T()); }
    T* data() { return at_.get(); }
    const T* data() const { return at_.get(); }
    T& operator[](size_t i) { return at_[i]; }
    const T& operator[](size_t i) const { return at_[i]; }

private:
    std::unique_ptr<T[], Free> at_;
};

}  // namespace waterfill
