// A minimal test harness that reports what failed and where.
#pragma once

#include <cstdio>
#include <cstdlib>

namespace fastlangevin {

inline void require(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
  std::exit(1);
}

}  // namespace fastlangevin

#define CHECK(...) ::fastlangevin::require((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
