// Loops shared out over short-lived threads. None outlives its call, so forking stays safe.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <limits>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastrecycle {

// A thread with less to do than this does not pay. Starting and joining one takes some 20 us where
// a core is free; where none is, its share waits for a time slice of several ms.
constexpr double worth_a_thread_ns = 1e6;

// Calls work(begin, end) on pieces of [0, count), on the caller's thread and at most threads - 1
// more. If pieces fail, the error of the first of them is thrown, whatever the number of threads.
template <class Work>
void parallel(std::int64_t count, double item_ns, int threads, const Work& work) {
  const double by_work = static_cast<double>(count) * item_ns / worth_a_thread_ns;
  threads = static_cast<int>(std::min<double>(threads, by_work));
  if (threads <= 1) {
    if (count > 0) work(std::int64_t{0}, count);
    return;
  }
  const std::int64_t piece = std::max<std::int64_t>(1, count / (8 * std::int64_t{threads}));
  std::atomic<std::int64_t> next{0};
  std::mutex failing;
  std::int64_t failed_at = std::numeric_limits<std::int64_t>::max();
  std::exception_ptr failure;
  auto run = [&] {
    for (;;) {
      const std::int64_t begin = next.fetch_add(piece);
      if (begin >= count) return;
      try {
        work(begin, std::min(begin + piece, count));
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failing);
        if (begin < failed_at) {
          failed_at = begin;
          failure = std::current_exception();
        }
      }
    }
  };
  std::vector<std::thread> others;
  others.reserve(static_cast<std::size_t>(threads - 1));
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(run);
  } catch (const std::system_error&) {
    // the system gives no more threads: those there are do the work
  }
  run();
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace fastrecycle
