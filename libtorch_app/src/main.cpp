#include <torchweld/torchweld.h>

#include <exception>
#include <iostream>
#include <new>

#include "commands.h"
#include "error.h"
#include "runtime.h"

namespace {

struct Run {
  int operator()(const weld::ShowText& show) const {
    std::cout << show.text;
    return 0;
  }
  int operator()(const weld::ShowVersion&) const {
    std::cout << "weld " WELD_VERSION " (torch " << weld::torch_version() << ", torchweld "
              << torchweld::version() << ")\n";
    return 0;
  }
  int operator()(const weld::InspectOptions& options) const { return weld::inspect(options); }
  int operator()(const weld::PredictOptions& options) const { return weld::predict(options); }
};

int fail(const char* what, int code) {
  std::cout.flush();
  std::cerr << "weld: error: " << what << '\n';
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    torchweld::cpu_capability();
  } catch (const std::exception& error) {
    return fail(error.what(), 2);  // TORCHWELD_CPU_CAPABILITY names what this machine cannot run
  }
  try {
    const int code = std::visit(Run{}, weld::parse_command_line(argc, argv));
    if (!std::cout.flush()) return fail("standard output cannot be written", 1);
    return code;
  } catch (const weld::InputError& error) {
    return fail(error.what(), 2);
  } catch (const std::bad_alloc&) {
    return fail("out of memory", 1);
  } catch (const std::exception& error) {
    return fail(error.what(), 1);
  }
}
