// Runs every suite, on each instruction set of the machine: kernels are chosen once a process (EFFCORE_ISA), so the program
// starts itself again for the lower ones.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "effcore/cpu.h"
#include "test.h"

namespace effcore::test {
namespace {

int passed = 0, failed = 0;

std::vector<void (*)()>& suites() {
  static std::vector<void (*)()> all;
  return all;
}

}  // namespace

void expect(bool condition, const std::string& what) {
  ++(condition ? passed : failed);
  if (!condition) std::printf("FAILED (%s): %s\n", isa_name(), what.c_str());
}

Suite::Suite(void (*run)()) {
  suites().push_back(run);
}

int run(int argc, char** argv) {
  for (void (*suite)() : suites()) suite();
  std::printf("%s: %d passed, %d failed\n", isa_name(), passed, failed);
  bool good = failed == 0;
  const bool child = argc > 1;
#if defined(__x86_64__)
  const char* isas[] = {"v2", "v3", "v4", "bf16"};
  for (int level = 0; !child && level < static_cast<int>(isa()); ++level) {
    std::fflush(stdout);
    const std::string command = std::string("EFFCORE_ISA=") + isas[level] + " '" + argv[0] + "' child";
    good = std::system(command.c_str()) == 0 && good;
  }
#endif
  return good ? 0 : 1;
}

}  // namespace effcore::test

int main(int argc, char** argv) {
  return effcore::test::run(argc, argv);
}
