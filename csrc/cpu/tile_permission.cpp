// Linux's interface: Documentation/arch/x86/xstate.rst.
#include "cpu/tile_permission.h"

#if defined(FASTLANGEVIN_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#endif

namespace fastlangevin {
namespace cpu {

#if defined(FASTLANGEVIN_AMX) && defined(__linux__)

namespace {

// Whether the system saves the configuration and the data of tiles when it switches threads.
bool tiles_are_saved() {
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3u) == 3u;
}

std::string ask() {
  if (!has_tiles()) return "this processor or system has none";
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequest, kTileData) == 0) return "";
  if (errno == ENOSPC) return "the system refuses: a thread has a small signal stack";
  return std::string("the system refuses: ") + std::strerror(errno);
}

}  // namespace

bool has_tiles() {
  // AVX-512 implies that xgetbv exists. Not every compiler knows the names of AMX's features.
  unsigned a, b, c, d = 0;
  const bool known = __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 0, &a, &b, &c, &d);
  constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;
  return known && (d & kBFloat16) && (d & kTiles) && tiles_are_saved();
}

const char* why_no_tiles() {
  static const std::string reason = ask();
  return reason.empty() ? nullptr : reason.c_str();
}

#else

bool has_tiles() { return false; }

const char* why_no_tiles() { return "this build has no code for them"; }

#endif

}  // namespace cpu
}  // namespace fastlangevin
