package app

// GCPercent is GOGC of a process with a NATS server for so many live bytes.
var GCPercent = gcPercent
