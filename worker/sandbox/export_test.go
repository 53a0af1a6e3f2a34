package sandbox

// What tests see of where user IDs begin.
const (
	HostFirstUID      = hostFirstUID
	ContainerFirstUID = containerFirstUID
)

func DefaultFirstUID() int { return defaultFirstUID() }
