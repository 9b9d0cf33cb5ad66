// Whether this process may use the tiles of AMX.
#pragma once

namespace fastlangevin {
namespace cpu {

// Whether the processor has tiles for bfloat16, this build has code for them, and the system saves
// them. Asks for nothing.
bool has_tiles();

// Asks the system for permission at the first call. Returns null if tiles may be used, or the
// reason why not. Linux gives permission to a process, for all of its threads and forks. It refuses
// if a thread's signal stack (sigaltstack) is too small to save the tiles on, and afterwards
// refuses to set up such stacks. Therefore nothing is asked before tiles are about to be used.
const char* why_no_tiles();

}  // namespace cpu
}  // namespace fastlangevin
