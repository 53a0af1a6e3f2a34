package frontend

// What tests of this package see besides its API.
var (
	StatusOf      = statusOf
	EndOf         = endOf
	SentinelCodes = sentinelCodes
)

// Sentinel is the error of a row of SentinelCodes.
func (r sentinelCode) Sentinel() error { return r.sentinel }

// The package's own sentinels.
var (
	ErrInvalid       = errInvalid
	ErrRange         = errRange
	ErrDenied        = errDenied
	ErrDisabled      = errDisabled
	ErrOversized     = errOversized
	ErrTooLarge      = errTooLarge
	ErrUnimplemented = errUnimplemented
	ErrNotFound      = errNotFound
	ErrDamaged       = errDamaged
	ErrDraining      = errDraining
	ErrInterrupted   = errInterrupted
	ErrStalled       = errStalled
	ErrSlow          = errSlow
	ErrPanic         = errPanic
)

// The bounds that tests reach.
const (
	MaxStatusText        = maxStatusText
	MaxViolations        = maxViolations
	MaxTrailerViolations = maxTrailerViolations
	PresentEvery         = presentEvery
)
