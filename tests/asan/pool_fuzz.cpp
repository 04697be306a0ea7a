// The pool: every piece of work once, whoever asks, whatever is thrown, and in a child of fork too.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "fuzz.h"
#include "pool.h"

using namespace waterfill;

namespace {

bool once_each(size_t count, unsigned threads, bool nested) {
    std::vector<std::atomic<int>> hits(count);
    pool::run(count, threads, [&](size_t i) {
        hits[i] += 1;
        if (nested) pool::run(3, 4, [&](size_t) { hits[i] += 1; });
    });
    for (const auto& hit : hits)
        if (hit != (nested ? 4 : 1)) return false;
    return true;
}

bool passes_on(unsigned threads) {
    try {
        pool::run(9, threads, [](size_t i) {
            if (i == 4) throw std::runtime_error("four");
        });
    } catch (const std::runtime_error&) {
        return true;
    }
    return false;
}

bool works(unsigned rounds) {
    for (unsigned round = 0; round < rounds; ++round) {
        const unsigned threads = 1 + unsigned(random(6));
        if (!once_each(random(50), threads, random(2)) || !passes_on(threads)) return false;
        if (round % 64 == 0) usleep(200);  // long enough for workers to fall asleep
    }
    return true;
}

bool works_for_several(unsigned rounds) {
    std::atomic<size_t> total{0};
    std::vector<std::thread> callers;
    for (int c = 0; c < 3; ++c)
        callers.emplace_back([&] {
            for (unsigned round = 0; round < rounds; ++round) pool::run(10, 3, [&](size_t) { total += 1; });
        });
    for (std::thread& caller : callers) caller.join();
    return total == 3 * 10 * size_t(rounds);
}

}  // namespace

int main(int argc, char** argv) {
    const unsigned rounds = argc > 1 ? unsigned(std::atoi(argv[1])) : 1000;
    if (!works(rounds) || !works_for_several(rounds)) return 1;
    const pid_t child = fork();
    if (child == 0) _exit(works(rounds / 4) ? 0 : 1);
    int status = 0;
    waitpid(child, &status, 0);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || !works(rounds)) return 1;
    std::printf("%u rounds\n", rounds);
    return 0;
}
