#include <iostream>

#include "lib/greet.h"

int main() {
  const std::string got = Greet("test");
  if (got.find("test") == std::string::npos) {
    std::cerr << "Greet(\"test\") = " << got << ", want a greeting that has the name" << std::endl;
    return 1;
  }
}
