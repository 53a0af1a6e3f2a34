package app

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/alecthomas/kong"
	"gopkg.in/yaml.v3"
)

// maxConfig bounds the configuration file.
const maxConfig = 1 << 20

// loadYAML reads a configuration file: flag names at the top, or below the name of a command.
func loadYAML(r io.Reader) (kong.Resolver, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxConfig))
	if err != nil {
		return nil, err
	}
	values := map[string]any{}
	if err := yaml.Unmarshal(data, &values); err != nil {
		return nil, fmt.Errorf("configuration file: %w", err)
	}
	return yamlFile(values), nil
}

type yamlFile map[string]any

// Resolve returns the value of a flag that the environment does not set: the command's own before
// the common one.
func (f yamlFile) Resolve(_ *kong.Context, parent *kong.Path, flag *kong.Flag) (any, error) {
	for _, name := range flag.Tag.Envs {
		if _, ok := os.LookupEnv(name); ok {
			return nil, nil //nolint:nilnil // kong's word for "not from here"
		}
	}
	if section, ok := f[parent.Node().Name].(map[string]any); ok {
		if value, ok := section[flag.Name]; ok {
			return plain(value), nil
		}
	}
	return plain(f[flag.Name]), nil
}

// plain turns numbers and booleans into the text that flags are parsed from.
func plain(value any) any {
	switch v := value.(type) {
	case nil, string, bool, []any:
		return v
	case map[string]any:
		return nil
	default:
		return fmt.Sprint(v)
	}
}

// Validate reports every key that no flag has.
func (f yamlFile) Validate(app *kong.Application) error {
	known := map[string]bool{}
	flags := func(node *kong.Node, prefix string) {
		for _, flag := range node.Flags {
			known[prefix+flag.Name] = true
			known[flag.Name] = true
		}
	}
	flags(app.Node, "")
	for _, command := range app.Children {
		flags(command, command.Name+".")
	}
	var unknown []string
	for key, value := range f {
		section, ok := value.(map[string]any)
		if !ok && !known[key] {
			unknown = append(unknown, key)
		}
		for inner := range section {
			if !known[key+"."+inner] {
				unknown = append(unknown, key+"."+inner)
			}
		}
	}
	slices.Sort(unknown)
	var errs []error
	for _, key := range unknown {
		errs = append(errs, fmt.Errorf("configuration file: no flag is named %q", key))
	}
	return errors.Join(errs...)
}
