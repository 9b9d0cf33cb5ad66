// Distributes work over the threads that the process already has.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace fastlangevin {

// The OpenMP runtime that torch has loaded into the process, if one can be found. Its threads stay
// awake between torch's operators. Another pool of threads or a second OpenMP runtime would compete
// with them for the same cores, and starting threads takes longer than a small step.
struct OpenMP {
  using Body = void (*)(void*);
  void (*parallel)(Body, void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread_number)() = nullptr;
  int (*team_size)() = nullptr;

  static const OpenMP& instance() {
    static const OpenMP found;
    return found;
  }
  bool present() const { return parallel && thread_number && team_size; }

 private:
  OpenMP() {
#if defined(__linux__)
    // The runtimes of GNU and LLVM both export these names.
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_number = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    team_size = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
  }
};

// Calls body(first, last) on disjoint ranges that cover [0, total), on at most `threads` threads.
template <class Body>
void parallel_for(int64_t total, int threads, const Body& body) {
  struct Team {
    const Body& body;
    int64_t total;
    void share(int64_t number, int64_t size) const {
      body(total * number / size, total * (number + 1) / size);
    }
  } team{body, total};
  if (threads > total) threads = static_cast<int>(total);
  if (threads <= 1) return body(int64_t{0}, total);
  if (OpenMP::instance().present()) {
    const auto run = [](void* data) {
      const OpenMP& openmp = OpenMP::instance();
      static_cast<const Team*>(data)->share(openmp.thread_number(), openmp.team_size());
    };
    return OpenMP::instance().parallel(run, &team, static_cast<unsigned>(threads), 0);
  }
  std::vector<std::thread> others;
  for (int k = 1; k < threads; ++k) others.emplace_back([&, k] { team.share(k, threads); });
  team.share(0, threads);
  for (std::thread& other : others) other.join();
}

}  // namespace fastlangevin
