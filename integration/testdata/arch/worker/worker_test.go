package worker_test

// A go statement in a test is allowed.
func start(f func()) { go f() }
