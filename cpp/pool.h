// Threads that stay, shared by all kernels that must start within microseconds.
//
// For callers of kernels only: a kernel is compiled once per instruction set, and must not make a
// pool of its own.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>

#if __has_include(<unistd.h>)
#include <unistd.h>
#endif

namespace waterfill::pool {

constexpr unsigned kMaxThreads = 256;
// Between two layers of a model a worker spins, so that the next one finds it awake.
constexpr std::chrono::microseconds kSpin{50};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline long process() {
#if __has_include(<unistd.h>)
    return long(getpid());
#else
    return 0;
#endif
}

// One job at a time. The gate holds the number of the job and how many workers may still enter it;
// whoever enters is waited for, and nobody enters once the owner has closed it.
class Pool {
public:
    // False where the pool is at work for another thread.
    bool run(size_t count, unsigned threads, void (*work)(void*, size_t), void* context) {
        std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
        if (!owner) return false;
        grow(threads - 1);
        const uint64_t seats = std::min(threads - 1, workers_);
        next_.store(0, std::memory_order_relaxed);
        left_.store(0, std::memory_order_relaxed);
        failed_.store(false, std::memory_order_relaxed);
        count_ = count, work_ = work, context_ = context, failure_ = nullptr;
        const uint64_t job = (gate_.load(std::memory_order_relaxed) & ~kSeats) + kSeats + 1;
        gate_.store(job | seats);
        if (asleep_.load() > 0) {
            { std::lock_guard<std::mutex> lock(sleep_); }
            wake_.notify_all();
        }
        take();
        const uint64_t entered = seats - (gate_.exchange(job) & kSeats);
        while (left_.load(std::memory_order_acquire) != entered) relax();
        if (failure_) std::rethrow_exception(failure_);
        return true;
    }

private:
    static constexpr uint64_t kSeats = 0xFFFF;

    void grow(unsigned wanted) {
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // Fewer threads than asked for: the work is the same.
        }
    }

    void take() {
        for (size_t i; !failed_.load(std::memory_order_relaxed) && (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) {
            try {
                work_(context_, i);
            } catch (...) {
                if (!failed_.exchange(true)) failure_ = std::current_exception();
            }
        }
    }

    bool enter(uint64_t& gate) {
        while (gate & kSeats)
            if (gate_.compare_exchange_weak(gate, gate - 1)) return true;
        return false;
    }

    void serve() {
        inside() = true;
        for (uint64_t seen = 0;;) {
            uint64_t gate = await(seen);
            seen = gate & ~kSeats;
            if (!enter(gate)) continue;
            seen = gate & ~kSeats;
            take();
            left_.fetch_add(1, std::memory_order_release);
        }
    }

    // The gate, once it is another job's than `seen`.
    uint64_t await(uint64_t seen) {
        const auto other = [&] { return (gate_.load() & ~kSeats) != seen; };
        const auto end = std::chrono::steady_clock::now() + kSpin;
        do {
            for (int i = 0; i < 32; ++i) {
                if (other()) return gate_.load();
                relax();
            }
        } while (std::chrono::steady_clock::now() < end);
        std::unique_lock<std::mutex> lock(sleep_);
        asleep_.fetch_add(1);
        wake_.wait(lock, other);
        asleep_.fetch_sub(1);
        return gate_.load();
    }

public:
    // Whether this thread is at work for a pool already.
    static bool& inside() {
        thread_local bool value = false;
        return value;
    }

private:
    std::mutex owner_, sleep_;
    std::condition_variable wake_;
    unsigned workers_ = 0;
    std::atomic<uint64_t> gate_{0};
    std::atomic<unsigned> asleep_{0};
    std::atomic<size_t> next_{0};
    std::atomic<uint64_t> left_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr failure_;
    size_t count_ = 0;
    void (*work_)(void*, size_t) = nullptr;
    void* context_ = nullptr;
};

// The pool of this process. A child made by fork has none of its parent's threads and makes its
// own; pools are never destroyed, for their threads may outlast every destructor.
inline Pool& shared() {
    struct Owned {
        long process;
        Pool pool;
    };
    static std::atomic<Owned*> current{nullptr};
    const long self = process();
    Owned* owned = current.load(std::memory_order_acquire);
    while (!owned || owned->process != self) {
        Owned* made = new Owned{self, {}};
        if (current.compare_exchange_strong(owned, made)) return made->pool;
        delete made;
    }
    return owned->pool;
}

// work(i) for every i below `count`, on this thread and at most `threads` - 1 others; rethrows the
// first exception. Inside work, or while another thread uses the pool, it runs on this thread alone.
template <class Work> void run(size_t count, unsigned threads, Work&& work) {
    threads = unsigned(std::min<size_t>({threads, count, kMaxThreads}));
    if (threads > 1 && !Pool::inside()) {
        using Plain = std::remove_reference_t<Work>;
        struct Inside {
            Inside() { Pool::inside() = true; }
            ~Inside() { Pool::inside() = false; }
        } mark;
        void* context = const_cast<void*>(static_cast<const void*>(&work));
        if (shared().run(count, threads, [](void* at, size_t i) { (*static_cast<Plain*>(at))(i); }, context)) return;
    }
    for (size_t i = 0; i < count; ++i) work(i);
}

}  // namespace waterfill::pool
